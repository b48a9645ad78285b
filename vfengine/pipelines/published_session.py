"""The networks of a published text-to-video model, one after another.

A network is read when it is needed. On a CPU it leaves memory when it is done. On CUDA, where
reading and capturing it again takes longer than the work itself, it leaves only if the next one
has no room beside it.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from ..formats.load import load_autoencoder, load_text_encoder, load_unet
from ..formats.text_to_video import TextToVideoModel
from ..formats.tokenizer import ClipTokenizer
from ..models.denoisers import PretrainedGenerator
from ..plan.memory import return_memory
from ..sampling.cuda_graph import empty_cache
from ..sampling.driver import Driver
from ..sampling.guidance import prompted
from ..sampling.reuse import KeptLoops
from ..sampling.run import Run

_TEXTS = 64  # whose rows are kept, for further batches of a request


class PublishedSession:
    """Text encoder, UNet and autoencoder of one model on one device.

    capture: on CUDA, replay steps and frames from graphs
    """

    def __init__(
        self, model: TextToVideoModel, device: torch.device, dtype: torch.dtype, capture: bool
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.networks: dict[str, nn.Module] = {}
        self.loops = KeptLoops()
        self.driver = Driver(capture, loops=self.loops)
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    # -- the three phases --------------------------------------------------------------------------

    def embedded(self, texts: Sequence[str], run: Run) -> Tensor:
        """Texts as the UNet attends to them, [T, L, D] on the device."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._texts]

        def encode(encoder: nn.Module) -> Tensor:
            run.report("text", 0, 1)
            _warn_of_cuts(encoder.tokenize, unknown)
            with run.timed("text", self.device), torch.inference_mode():
                return encoder(encoder.tokenize(unknown).to(self.device))

        if unknown:
            rows = self._with_network("text", load_text_encoder, run, encode)
            self._texts.update(zip(unknown, rows.unbind(), strict=True))
            run.report("text", 1, 1)
        found = torch.stack([self._texts[text] for text in texts])
        for text in texts:
            self._texts.move_to_end(text)
        while len(self._texts) > _TEXTS:
            self._texts.popitem(last=False)
        return found

    def sampled(
        self,
        noise: Tensor,
        prompt: tuple[Tensor, Tensor | None, float],
        table: SolverTable,
        place: NoisePlace,
        windows: tuple[int, int] | None,
        run: Run,
    ) -> Tensor:
        """Latents of noise [B, N, C, h, w].

        prompt: rows of the prompts and of the negative ones [B, L, D], and the guidance scale
        """
        untimed = Run(run.callback, timings=None)

        def sample(denoiser: nn.Module) -> Tensor:
            with run.timed("video", self.device):
                model = prompted(denoiser, *prompt)
                return self.driver.video(model, noise, table, place, untimed, windows)

        return self._with_network("video", self._denoiser, run, sample)

    def decoded(self, latents: Tensor, run: Run) -> Tensor:
        """Clips [B, N, 3, H, W], nominally in -1..1, of latents as the autoencoder takes them."""
        total = latents.shape[0] * latents.shape[1]

        def report(done: int, total: int) -> None:
            run.report("decode", done, total)

        def decode(autoencoder: nn.Module) -> Tensor:
            report(0, total)
            with run.timed("decode", self.device), torch.inference_mode():
                return autoencoder.decode(latents, callback=report)

        load = partial(load_autoencoder, encodes=False, capture=self.driver.capture)
        return self._with_network("decode", load, run, decode)

    # -- networks ----------------------------------------------------------------------------------

    def _denoiser(self, source: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
        published = self.model.schedule
        unet = load_unet(source, dtype, device)
        denoiser = PretrainedGenerator(unet, published.schedule, published.prediction_type)
        return denoiser.to(device).eval()

    def _with_network(
        self,
        name: str,
        load: Callable[[Path, torch.dtype, torch.device], nn.Module],
        run: Run,
        work: Callable[[nn.Module], Tensor],
    ) -> Tensor:
        """What `work` makes with a network, from memory or from its files.

        Nothing else may hold the network: it could not leave memory.
        """
        if name not in self.networks:
            with run.timed("load", self.device):
                self._make_room(name)
                self.networks[name] = load(self.model.folder, self.dtype, self.device)
        try:
            return work(self.networks[name])
        finally:
            if self.device.type == "cpu":
                self.release(name)

    def _make_room(self, name: str) -> None:
        """Releases the other networks if CUDA's memory has no room for this one beside them.

        Room is twice its weights: for themselves, and as much again to work in.
        """
        if self.device.type != "cuda" or not self.networks:
            return
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        room = torch.cuda.mem_get_info(self.device)[0] + idle
        if 2 * self.model.num_weights[name] * self.dtype.itemsize > room:
            for other in list(self.networks):
                self.release(other)

    def release(self, name: str) -> None:
        """Frees a network and the loop that holds it."""
        if self.networks.pop(name, None) is None:
            return
        self.loops.release(name)
        if self.device.type == "cuda":
            empty_cache()
        else:
            return_memory()


def _warn_of_cuts(tokenizer: ClipTokenizer, texts: Sequence[str]) -> None:
    """A UserWarning for each text that is longer than the encoder reads."""
    most = tokenizer.length - 2  # without start and end
    for text in texts:
        if (count := len(tokenizer.tokens(text))) > most:
            warnings.warn(
                f"a prompt is cut: it has {count} tokens, the text encoder reads {most}: "
                f"{text[:40]!r} …",
                stacklevel=2,
            )
