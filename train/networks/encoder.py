"""What heads, training and inference ask of a backbone, whichever library it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cac_fast.train.networks.weights import read_file
from cac_fast.train.preprocessing import Preprocessing
from cac_fast.train.progress import warn


class Encoder(nn.Module):
    """A classifier without its classifying layers, dilated.

    `forward` takes (B, 3, H, W), H and W multiples of `preprocessing.multiple`, and returns
    (B, low_channels, H / l, W / l) and (B, high_channels, H / s, W / s), with the strides l and s
    that it was built for.

    library: name and version of the library that it depends on for more than its weights' names.
    """

    low_channels: int
    high_channels: int
    preprocessing = Preprocessing()
    library: str | None = None

    def blocks(self) -> list[nn.Module]:
        """The modules that activation checkpointing computes again one by one."""
        raise NotImplementedError

    def read_weights(self, source: Path) -> dict[str, Any]:
        """The content of a weights file, its tensors under this backbone's names but for what
        programs put in front of them or around them; of a run of this program as it is.

        Raises:
            InputError: the file cannot be read.
        """
        return read_file(source)

    def description(self) -> dict[str, Any]:
        """What a checkpoint says of this backbone."""
        return {"library": self.library, "preprocessing": self.preprocessing._asdict()}

    def adopt(self, description: dict[str, Any]) -> None:
        """Take over from a checkpoint's `description` how images are made ready ({}: an old one).

        Warns if the checkpoint was made with another version of the library.
        """
        made_with = description.get("library", self.library)
        if made_with != self.library:
            warn(f"the checkpoint was made with {made_with}, here is {self.library}")
        self.preprocessing = self.preprocessing._replace(**description.get("preprocessing", {}))
