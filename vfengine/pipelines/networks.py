"""What both sessions share: networks in memory on one device, and the loops that hold them.

Text encoders and autoencoders run here, before and after what a session samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..plan.memory import return_memory
from ..sampling.cuda_graph import empty_cache
from ..sampling.driver import Driver
from ..sampling.finite import check_finite
from ..sampling.reuse import KeptLoops
from ..sampling.run import Run

_TEXTS = 64  # whose rows are kept, for further batches of a request


class Networks:
    """Networks by name, each with the loop of its phase; "text" and "decode" are of both sessions.

    device:  of what is made: clips, and base paths once they are walked
    capture: on CUDA, replay steps from graphs

    stays: whether text encoder and autoencoder stay in memory on a CPU, as a server wants it; a
           call of the pipeline may keep them where this is False

    A subclass reads them, in `load`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, capture: bool) -> None:
        self.device, self.dtype, self.stays = device, dtype, False
        self.networks: dict[str, nn.Module] = {}
        self.loops = KeptLoops()
        self.driver = Driver(capture, loops=self.loops, dtype=dtype)
        self._texts: dict[str, Tensor] = {}  # replaced, never changed: threads may read it

    def place(self, name: str) -> torch.device:
        """The device of a network."""
        return self.device

    # -- texts and pictures ------------------------------------------------------------------------

    def embedded(self, texts: Sequence[str], run: Run) -> Tensor:
        """Texts as networks attend to them, [T, L, D] on the text encoder's device.

        Rows of the last texts are kept: a further call with them needs no text encoder. A
        UserWarning names words that it does not know, and texts that are longer than it reads.
        Raises `NotFinite`, as `decoded` does.
        """

        def encode(encoder: nn.Module) -> Tensor:
            run.report("text", 0, 1)
            _warn(encoder.tokenize, unknown)
            device = self.place("text")
            with run.timed("text", device), torch.inference_mode():
                rows = encoder(encoder.tokenize(unknown).to(device))
                return check_finite(rows, "text phase", self.dtype)

        # a call on another thread may drop rows from those kept, but none from these
        known = {text: rows for text in texts if (rows := self._texts.get(text)) is not None}
        if unknown := [text for text in dict.fromkeys(texts) if text not in known]:
            rows = self.with_network("text", run, encode)
            known.update(zip(unknown, rows.unbind(), strict=True))
            run.report("text", 1, 1)
        others = [(text, rows) for text, rows in self._texts.items() if text not in known]
        self._texts = dict([*others, *known.items()][-_TEXTS:])
        return torch.stack([known[text] for text in texts])

    def decoded(self, latents: Tensor, run: Run, keep: bool = False) -> Tensor:
        """Clips [B, N, 3, H, W], nominally in -1..1, of latents as the autoencoder takes them."""
        total = latents.shape[0] * latents.shape[1]

        def report(done: int, total: int) -> None:
            run.report("decode", done, total)

        def decode(autoencoder: nn.Module) -> Tensor:
            report(0, total)
            with run.timed("decode", self.device), torch.inference_mode():
                video = autoencoder.decode(latents, callback=report)
                for done, frame in enumerate(video.flatten(0, 1), 1):
                    check_finite(frame, f"decode phase, frame {done} of {total}", self.dtype)
                return video

        return self.with_network("decode", run, decode, keep)

    # -- networks ----------------------------------------------------------------------------------

    def load(self, name: str) -> nn.Module:
        """Reads a network, in its fastest form."""
        raise NotImplementedError

    def network(self, name: str, run: Run) -> nn.Module:
        """A network from memory or from its files."""
        if name not in self.networks:
            with run.timed("load", self.place(name)):
                self.make_room(name)
                self.networks[name] = self.load(name)
        return self.networks[name]

    def with_network(
        self, name: str, run: Run, work: Callable[[nn.Module], Tensor], keep: bool = False
    ) -> Tensor:
        """What `work` makes with a network, which on a CPU then leaves memory.

        keep: it stays

        Nothing else may hold the network: it could not leave memory.
        """
        try:
            return work(self.network(name, run))
        finally:
            if self.place(name).type == "cpu" and not (keep or self.stays):
                self.release(name)

    def release(self, name: str) -> None:
        """Frees a network and the loop that holds it."""
        if self.networks.pop(name, None) is None:
            return
        self.loops.release(name)
        if self.place(name).type == "cuda":
            empty_cache()
        else:
            return_memory()

    def make_room(self, name: str) -> None:
        """Frees what a network that is about to be read has no room beside."""

    def has_room(self, weights: int) -> bool:
        """Whether CUDA's memory has room for twice so many weights.

        For themselves, and as much again to work in; what torch caches is room too.
        """
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        room = torch.cuda.mem_get_info(self.device)[0] + idle
        return 2 * weights * self.dtype.itemsize <= room


def _warn(tokenizer: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> None:
    """A UserWarning for each text that is cut, and for words that the tokenizer does not know."""
    for text in texts:
        if (count := len(tokenizer.tokens(text))) > tokenizer.room:
            warnings.warn(
                f"a prompt is cut: it has {count} tokens, the text encoder reads {tokenizer.room}: "
                f"{text[:40]!r} …",
                stacklevel=2,
            )
    words = dict.fromkeys(word for text in texts for word in tokenizer.unknown(text))
    if words:
        warnings.warn(
            f"the text encoder does not know these words: {', '.join(words)}", stacklevel=2
        )
