"""One question each about a backbone, whatever method it came from."""
