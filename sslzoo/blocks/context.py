"""CPC's context network: what is known of an image from its top row down to here."""

import torch
from torch import Tensor, nn


class Context(nn.Module):
    """Summary of a grid's rows from the first to one's own, by masked convolutions: ``(B, G, G, D) -> (B, G, G, D)``.

    Residual blocks in the manner of PixelCNN, whose 2x1 convolution looks at its row and the one above. No row sees
    one below it; of its own row and those above, it sees as many places to the sides as there are blocks.

    Args:
        dim: D.
        hidden: channels inside a block.
        blocks: how many; each reaches one row further up.
    """

    def __init__(self, dim: int, hidden: int = 256, blocks: int = 5):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, hidden, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)),
                nn.Conv2d(hidden, hidden, (2, 1)),
                nn.ReLU(inplace=True),
                nn.Conv2d(hidden, dim, 1),
            )
            for _ in range(blocks)
        )

    def forward(self, z: Tensor) -> Tensor:
        c = z.permute(0, 3, 1, 2)  # (B, D, G, G)
        for block in self.blocks:
            c = c + block(c)
        return torch.relu(c).permute(0, 2, 3, 1)
