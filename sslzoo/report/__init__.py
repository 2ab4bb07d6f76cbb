"""What people look at before they read: logs, curves, neighbours."""
