"""The training loop: stage 1 (BLIP-2, section 3.1), and fine-tuning, which trains the encoder too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .batches import Batch, BatchSource
from .distributed import World, any_says, gather, gather_reasons
from .errors import DeviceMemoryError, RecipeError, TrainingError
from .frozen_parts import FrozenStages, FrozenTexts, frozen_stages
from .interrupts import deferred_interrupts
from .losses import itc_loss, itg_loss, itm_loss
from .model import Precision, RetrievalModel, autocast
from .optimizer import freeze_unused, hardness, learning_rate, parameter_groups
from .preprocess import TextTransform
from .recipe import TrainConfig, TrainPrecision
from .run_folder import RunFolder, TrainingState
from .text_batch import TextBatch

TEMPERATURES = (0.01, 0.5)

Losses = dict[str, Tensor]
Observer = Callable[[Mapping[str, Any]], None]  # of an update's or a validation's numbers
Validate = Callable[[RetrievalModel], dict[str, float]]


class Objectives(nn.Module):
    """The losses of a batch, as one module that DDP can wrap."""

    def __init__(
        self,
        model: RetrievalModel,
        config: TrainConfig,
        encoded: bool,
        processes: int = 1,
        stages: FrozenStages | None = None,
        texts: FrozenTexts | None = None,
    ) -> None:
        """Compute from encoder tokens (`encoded`) or from pixels; each process does its share.

        Where they are given, `stages` encode pixels and `texts` captions.
        """
        super().__init__()
        self.model = model
        self.config = config
        self.encoded = encoded
        self._anchors = config.itm_anchors and config.itm_anchors // processes
        self._stages, self._texts = stages, texts

    def forward(
        self, images: Tensor, text: TextBatch, group_ids: Tensor, hard: float, seed: int
    ) -> Losses:
        """Return the unweighted losses of the objectives that have a weight.

        The query pass made for ITC serves ITG too.

        Args:
            images: pixels (b, 3, S, S) or encoder tokens (b, P, D).
            text: the b * K captions, the K of an image one after the other.
            group_ids: (b,), int64.
            hard: the hardness of ITM's negatives.
            seed: of the draw of negatives; the same in all processes.
        """
        model, config = self.model, self.config
        tokens = images if self.encoded else (self._stages or model.image_encoder)(images)
        queries = model.query_pass(model.normalise_tokens(tokens))
        texts = model.features_from_text(self._text_states(text))
        itc = itc_loss(queries.image_features, texts, model.temperature, group_ids)
        losses = {"itc": itc.loss}
        text = text.select(torch.arange(0, len(text.mask), len(text.mask) // len(images)))
        if config.itm_weight:
            losses["itm"] = itm_loss(
                model, tokens, text, itc, group_ids,
                hardness=hard,
                anchors=self._anchors,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
        if config.itg_weight:
            dec_id = model.config.qformer.vocab_size - 1
            losses["itg"] = itg_loss(model, text, queries.keys_values, dec_id)
        return losses

    def _text_states(self, text: TextBatch) -> Tensor:
        model = self.model
        if not self.config.freeze_text:
            return model.text_states(text)
        if self._texts is not None:
            return self._texts(text)
        model.qformer.eval()  # without dropout
        with torch.no_grad():
            states = model.text_states(text)
        model.qformer.train(self.training)
        return states


class Trainer:
    """One run: `Trainer(model, source, config).run()`."""

    def __init__(
        self,
        model: RetrievalModel,
        source: BatchSource,
        config: TrainConfig,
        *,
        text_transform: TextTransform | None = None,
        frozen_texts: FrozenTexts | None = None,
        folder: RunFolder | None = None,
        world: World | None = None,
        validate: Validate | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Prepare the model for training; what is not trained loses its gradient.

        Args:
            model: on its device, in float32; trained in place.
            source: the batches.
            config: the recipe; `steps` must be set (`recipe.with_total_steps`).
            text_transform: tokenises the captions; the model's own by default.
            frozen_texts: of all captions of the source, where `config.freeze_text`; without it they pass
                through the text half each time.
            folder: where checkpoints go; without one none are written.
            world: this process among others.
            validate: called every `validate_every` updates and after the last; "mean_recall" in what
                it returns decides which model is the best.
            observers: called in the first process with the numbers of every update and validation,
                and with {"skipped": [reason, ...]} for images that could not be read.

        Raises:
            RecipeError: the recipe cannot train this model, or not in this world.
        """
        if config.steps is None:
            raise ValueError("count the epochs out as steps first: with_total_steps")
        if config.itg_weight and model.lm_head is None:
            raise RecipeError(
                "this model was published without a language-model head: --set train.itg_weight=0"
            )
        if config.itm_weight and not model.reranks:
            raise RecipeError("this model has no ITM head to train: --set train.itm_weight=0")
        self.model, self.config, self.source = model, config, source
        self.world = world or World()
        for name in ("batch_size", "itm_anchors"):
            if (getattr(config, name) or 0) % self.world.size:
                raise RecipeError(
                    f"train.{name}={getattr(config, name)} cannot be divided evenly among "
                    f"{self.world.size} processes"
                )
        self._steps = config.steps
        self._text_transform = text_transform or model.text_transform
        self._folder, self._validate, self._observers = folder, validate, observers
        self._precision = pick_precision(config.precision, model.device)
        if config.attention_dropout is not None:
            model.qformer.set_attention_dropout(config.attention_dropout)
        if config.gradient_checkpointing:
            model.image_encoder.checkpoint_gradients()
        freeze_unused(model, config)
        stages = None
        if not source.encoded and not config.gradient_checkpointing:
            stages = frozen_stages(model, self._precision)
        objectives = Objectives(
            model, config, source.encoded, self.world.size, stages, frozen_texts
        )
        self.state = TrainingState(
            model=model,
            optimizer=torch.optim.AdamW(parameter_groups(model, config), betas=config.betas),
            scaler=torch.amp.GradScaler(model.device.type, enabled=self._precision == "fp16"),
            average=_average(model, config),
        )
        self._objectives: nn.Module = objectives
        if self.world.size > 1:
            self._objectives = DistributedDataParallel(objectives)

    def run(self) -> list[dict[str, float]]:
        """Train to the end; return the numbers of every update of this call.

        Raises:
            TrainingError: a loss or a gradient is no number.
            DeviceMemoryError: a batch does not fit into the GPU's memory.
            KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was written before.
        """
        config, state = self.config, self.state
        first = state.step * config.accumulate
        batches = self.source.batches(config.batch_size, first, config.seed, self.world)
        history: list[dict[str, float]] = []
        with deferred_interrupts() as interrupted:
            while state.step < self._steps:
                history.append(self._update(batches))
                self.tell({"step": state.step, "steps": self._steps, **history[-1]})
                last = state.step == self._steps
                stop = any_says(interrupted()) and not last
                if last or (not stop and state.step % config.validate_every == 0):
                    self._run_validation()
                if last or stop or state.step % config.checkpoint_every == 0:
                    self._save()
                if stop:
                    raise KeyboardInterrupt
        self._objectives = nn.Module()  # lets go of DDP, see `joined_world`
        if state.average is not None:
            self.model.load_state_dict(state.averaged_model.state_dict())
        self.model.eval()
        self.model.refresh_fingerprint()
        return history

    def _update(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Do one update of the weights, from `accumulate` batches."""
        config, state = self.config, self.state
        start = time.perf_counter()
        self.model.train()
        rate = learning_rate(state.step, config)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        numbers: dict[str, float] = {}
        for part in range(config.accumulate):
            try:
                losses = self._backward(next(batches), part)
            except torch.OutOfMemoryError as error:
                raise DeviceMemoryError(
                    f"a batch of {config.batch_size} pairs does not fit into the GPU's memory: try a "
                    "smaller train.batch_size, or train.gradient_checkpointing=true"
                ) from error
            for name, value in losses.items():
                numbers[name] = numbers.get(name, 0.0) + value / config.accumulate
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        numbers["gradient_norm"] = float(norm)
        for name in ("loss", "gradient_norm"):
            # In fp16 gradients overflow now and then; the scaler then leaves the update out.
            overflow = name == "gradient_norm" and state.scaler.is_enabled()
            if not math.isfinite(numbers[name]) and not overflow:
                raise TrainingError(
                    f"the {name.replace('_', ' ')} of update {state.step + 1} is {numbers[name]}: "
                    "a lower train.lr or train.precision=fp32 may help"
                )
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.model.temperature.clamp_(*TEMPERATURES)
        if state.average is not None:
            state.average.update_parameters(self.model)
        state.step += 1
        pairs = config.batch_size * config.accumulate
        return numbers | {
            "temperature": float(self.model.temperature.detach()),
            "lr": rate,
            "pairs_per_second": pairs / (time.perf_counter() - start),
        }

    def _backward(self, batch: Batch, part: int) -> dict[str, float]:
        """Add the gradients of one batch; return its losses, averaged over the processes."""
        config, model, step = self.config, self.model, self.state.step
        skipped = gather_reasons(batch.skipped)
        if skipped:
            self.tell({"step": step + 1, "skipped": skipped})
        text = TextBatch.of(self._text_transform(batch.captions))
        if self.world.size > 1:  # negatives are gathered: captions must be equally long everywhere
            text = text.padded(self._text_transform.max_tokens)
        seed = step * config.accumulate + part
        torch.manual_seed(hash((config.seed, seed, self.world.rank)))  # of dropout
        with ExitStack() as stack:
            # Around the backward pass too: checkpointed blocks are computed again in it.
            stack.enter_context(attention_kernel(model.device))
            if part + 1 < config.accumulate and self.world.size > 1:
                stack.enter_context(self._objectives.no_sync())  # type: ignore[operator]
            with autocast(model.device, self._precision):
                losses = self._objectives(
                    batch.images.to(model.device),
                    text.to(model.device),
                    batch.group_ids.to(model.device),
                    hardness(step, config),
                    hash((config.seed, seed)),
                )
            weights = {
                "itc": config.itc_weight, "itm": config.itm_weight, "itg": config.itg_weight
            }  # fmt: skip
            losses["loss"] = sum(weights[name] * loss for name, loss in losses.items())
            self.state.scaler.scale(losses["loss"] / config.accumulate).backward()
        values = gather(torch.stack([loss.detach().float() for loss in losses.values()])[None])
        return dict(zip(losses, values.mean(dim=0).tolist(), strict=True))

    def _run_validation(self) -> None:
        """Validate in the first process, and keep the model if it is the best so far."""
        if self._validate is not None and self.world.is_first:
            state = self.state
            model = state.averaged_model
            model.eval()
            numbers = self._validate(model)
            self.tell({"step": state.step, "validation": numbers})
            if self._folder is not None and numbers["mean_recall"] > state.best:
                state.best = numbers["mean_recall"]
                self._folder.save_best(model)
        any_says(False)  # the others wait here

    def _save(self) -> None:
        if self._folder is not None and self.world.is_first:
            self._folder.save(self.state, keep=self.config.keep_checkpoints)
        any_says(False)  # the others wait here

    def tell(self, event: dict[str, Any]) -> None:
        """Tell the observers something."""
        if self.world.is_first:
            for observer in self._observers:
                observer(event)


def pick_precision(wanted: TrainPrecision, device: torch.device) -> Precision:
    """Return the arithmetic of training: "auto" is bf16 where the device computes in it.

    Otherwise fp16 on GPUs and fp32 on CPUs. A CPU without bf16 would emulate it, many times slower.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        # Older GPUs emulate bf16: torch.cuda.is_bf16_supported says yes all the same.
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def attention_kernel(device: torch.device) -> AbstractContextManager[None]:
    """Choose the attention kernel: on a CPU the fused one's backward pass is slow on short sequences.

    Measured at 48 tokens in bf16: a step takes 1.5 times as long with it.
    """
    if device.type != "cpu":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return kernel


def _average(model: RetrievalModel, config: TrainConfig) -> AveragedModel | None:
    if not config.ema_decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))  # type: ignore[no-untyped-call]
