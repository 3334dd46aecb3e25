"""The optimisation of adapters: transformers' `Trainer` with this project's loss, data order, clock and checkpoints."""

import difflib
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from layercard import processes
from layercard.adapters.methods import RankAllocation
from layercard.cost.training import heaviest_step, order_of
from layercard.data.checks import precision_advice
from layercard.data.load import IGNORED, Batch, Dataset, Example, collate
from layercard.errors import DivergedError, LayercardError, OutputError, ProcessError, TrainingError, one_line
from layercard.files import read_json, write_json
from layercard.measure import PeakMemory
from layercard.models.load import Progress
from layercard.models.losses import labelled_losses
from layercard.settings import METHODS, TrainSettings

LOG_FILE = "log.json"
"""Written into a checkpoint when all else is in it: a checkpoint without it was cut off while it was written."""
IDLE_STEPS = 20
"""An adapter that began at zero and is zero after so many steps will not learn."""
MEASUREMENTS = 10
"""How often the held-out loss is measured in a run that watches it (`TrainSettings.patience`)."""


@dataclass
class TrainLog:
    """What training did so far, in all processes together except for the time."""

    losses: list[float] = field(default_factory=list)  # nats per labelled token in each step, before that step's update
    seconds: float = 0.0  # within steps; the one step whose memory is counted takes about a tenth longer
    forward_seconds: float = 0.0  # of them computing losses, with the head's gradient where `labels_only` takes it there
    backward_seconds: float = 0.0
    tokens: int = 0  # padding not counted
    positions: int = 0  # padding counted
    curve: list[tuple[int, float, float]] = field(default_factory=list)  # `Run.curve` as far as it was measured
    peak_bytes: int = 0  # see `Run.peak_memory_bytes`; the first process's
    notes: list[str] = field(default_factory=list)  # what a user should know

    def watched(self, steps: int) -> list[tuple[float, int]]:
        """The held-out losses, each with its step, by which a run of so many steps is judged: ten, and that at its end."""
        every = math.ceil(steps / MEASUREMENTS)
        return [(loss, step) for step, _, loss in self.curve if step % every == 0 or step == steps]

    def has_turned(self, patience: int, steps: int) -> bool:
        """Whether the last `patience` of these losses were no better than one before them."""
        losses = self.watched(steps)
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def fit(
    model: PeftModel,
    data: Dataset,
    pad_id: int,
    settings: TrainSettings,
    folder: Path,
    *,
    labels_only: bool = False,
    resume: bool,
    progress: Progress | None,
    moments: Sequence[int] = (),
    measure: Callable[[], float] | None = None,
    expect: Callable[[Sequence[Example]], None] | None = None,
) -> TrainLog:
    """Train the adapters of `model`, with checkpoints in `folder`; with `resume` go on from the last whole one there.

    `labels_only` says that the model gives its loss from labelled positions by itself (`layercard.fast.labels`). After the steps in
    `moments` the log's `curve` gets what `measure` gives; that takes no part in the time of steps. With a `patience` in the settings
    there are ten moments more; the model ends with the adapters of the lowest of these ten, and training stops when so many in a row
    were no better than one before them. `expect` is told of each batch one before it trains.

    Raises:
        OutputError: A checkpoint cannot be written.
        TrainingError: A loss, gradient or trained weight is not finite, nothing learns, a checkpoint is damaged, memory runs out, or the
            machine cannot train with these settings.
    """
    steps, patience = settings.total_steps(len(data)), settings.patience
    order = order_of(data, settings)
    trainer = AdapterTrainer(model, [data.examples[row] for row in order], pad_id, settings, steps, folder, labels_only, expect)
    watch = _Watch(trainer, progress, len(order) / len(data), moments, measure)
    trainer.add_callback(watch)
    checkpoint = last_checkpoint(folder) if resume else None
    try:
        if checkpoint is not None:
            logging.getLogger(__name__).info("going on from %s", checkpoint)
            trainer.log_so_far = TrainLog(**read_json(checkpoint / LOG_FILE, TrainingError, "checkpoint"))
        if checkpoint is None or patience is None or not trainer.log_so_far.has_turned(patience, steps):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        log = trainer.log_so_far
        if patience is not None:
            (loss, best), done = min(log.watched(steps)), len(log.losses)
            checkpoint, watch.trains = folder / f"checkpoint-{best}", False  # one that is read from here on
            trainer._load_from_checkpoint(str(checkpoint), model)
            ending = f"training stopped after step {done} of {steps}" if done < steps else f"training took all {steps} steps"
            log.notes.append(f"{ending}; the held-out loss was lowest ({loss:.4f}) after step {best}, whose adapter is kept")
    except Exception as error:
        explained = _explained(error, settings, folder, None if watch.trains else checkpoint)
        if explained is None:
            raise
        raise explained from error
    finally:
        watch.peak.stop()
    broken = [name for name, weight in model.named_parameters() if weight.requires_grad and not weight.isfinite().all()]
    if broken:
        raise DivergedError(f"{broken[0]} is not finite after training; {trainer.advice()}")
    return trainer.log_so_far


def _explained(error: Exception, settings: TrainSettings, folder: Path, reading: Path | None) -> Exception | None:
    """An error of this package in place of one whose cause is known: the disk, memory, another process, or the checkpoint being read."""
    message, alone = one_line(error, 300), processes.count() == 1
    if isinstance(error, LayercardError):
        return None
    if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in message:
        kind, who = (TrainingError, "") if alone else (ProcessError, f"process {processes.rank()}: ")
        return kind(
            f"{who}memory ran out with {settings.batch_size} records in a batch; lower the batch size (and raise accumulation), "
            "or adapt fewer layers, nearer to the output"
        )
    if not alone and "onnection" in message:
        return TrainingError("another process of this run has ended; mend what it says, then pass --resume")
    if reading is not None:
        return TrainingError(
            f"the checkpoint {reading} cannot be read ({message}); remove that folder and pass --resume to go on from the one before it, "
            "or start again with --force"
        )
    if isinstance(error, (OSError, SafetensorError)) or "inline_container" in message or "PytorchStreamWriter" in message:
        full = shutil.disk_usage(folder).free < 2**20  # torch does not say why it could not write
        reason = "No space left on device" if full else message
        return OutputError(f"cannot write a checkpoint to {folder}: {reason}; make room, then pass --resume")
    return None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{LOG_FILE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class AdapterTrainer(Trainer):
    """`Trainer` whose loss is the sum over labelled tokens divided by their number in the whole accumulated batch."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PeftModel,
        examples: Sequence[Example],
        pad_id: int,
        settings: TrainSettings,
        steps: int,
        folder: Path,
        labels_only: bool = False,
        expect: Callable[[Sequence[Example]], None] | None = None,
    ) -> None:
        def inputs(rows: Sequence[Example]) -> dict[str, torch.Tensor]:
            if expect is not None:
                expect(rows)
            batch = collate(rows, range(len(rows)), pad_id)
            return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

        arguments = training_arguments(settings, steps, folder, next(model.parameters()).device)
        super().__init__(model=model, args=arguments, train_dataset=examples, data_collator=inputs)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss below is already divided over the accumulated batch
        self.settings = settings
        self.labels_only = labels_only
        self.allocation = RankAllocation.of(model)
        self.log_so_far = TrainLog()
        self.step_loss, self.step_tokens, self.step_positions = 0.0, 0, 0
        self.forward_seconds, self.backward_seconds = 0.0, 0.0
        if processes.count() > 1:
            torch.manual_seed(settings.seed + processes.rank())  # dropout differs between processes

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the order of the examples, which `shuffled` has shuffled; of several processes each gets every so many-th."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            sampler=SequentialSampler(self.train_dataset),
            collate_fn=self.data_collator,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> tuple[list[Any], torch.Tensor]:
        """This process's batches of one step, and the number of labelled tokens in those of all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        labelled = sum(int((sample["labels"][:, 1:] != IGNORED).sum()) for sample in samples)
        tokens = sum(int(sample["attention_mask"].sum()) for sample in samples)
        positions = sum(sample["attention_mask"].numel() for sample in samples)
        all_labelled, all_tokens, all_positions = processes.total([labelled, tokens, positions])
        self.step_loss, self.step_tokens, self.step_positions = 0.0, int(all_tokens), int(all_positions)
        return samples, torch.tensor(max(int(all_labelled), 1), device=device)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a batch, each timed; the loss is read in between, so that a device has done its work by then."""
        started, before = time.perf_counter(), self.forward_seconds
        loss = super().training_step(model, inputs, num_items_in_batch)
        if loss.device.type == "cuda":
            torch.cuda.synchronize(loss.device)
        self.backward_seconds += time.perf_counter() - started - (self.forward_seconds - before)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This batch's share of the step's loss, in nats per labelled token.

        The gradients of several processes are averaged, so that each multiplies its share by their number.
        """
        started = time.perf_counter()
        if self.labels_only:
            loss = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch).loss
        else:
            batch = Batch(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], tuple(range(len(inputs["input_ids"]))))
            loss = labelled_losses(model, batch)[0].sum() / num_items_in_batch
        self.step_loss += loss.item()
        self.forward_seconds += time.perf_counter() - started
        if processes.count() == 1:
            self.check_loss(self.step_loss, self.state.global_step + 1)
        if self.allocation is not None:
            loss = loss + self.allocation.penalty() / (self.args.gradient_accumulation_steps * processes.count())
        return loss * processes.count()

    def check_loss(self, loss: float, step: int) -> None:
        """Raise `DivergedError` if the loss is not finite."""
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}; {self.advice()}")

    def advice(self) -> str:
        """What to do about numbers that are not finite."""
        scale = f" or alpha ({self.settings.alpha:g})" if "alpha" in METHODS[self.settings.method] else ""
        bf16 = ", or train without --bf16" if self.settings.bf16 else ""
        return f"lower the learning rate ({self.settings.rate:g}){scale}{bf16 or precision_advice(self.model)}"

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the walk over all parameters that it needs would be timed with every step."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only the adapter, as safetensors, and without asking the hub for the base model's vocabulary."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder, save_embedding_layers=False)
            if self.allocation is not None:
                self.allocation.save(Path(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As transformers does, but for AdaLoRA, whose saved weights are cut to the ranks of the moment."""
        if self.allocation is not None:
            self.allocation.load(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _Watch(TrainerCallback):
    """Keeps the log, reports progress, marks checkpoints as whole, and looks whether adapters learn and when to stop."""

    def __init__(
        self,
        trainer: AdapterTrainer,
        progress: Progress | None,
        epochs: float,
        moments: Sequence[int],
        measure: Callable[[], float] | None,
    ) -> None:
        self.trainer, self.progress, self.epochs, self.moments, self.measure = trainer, progress, epochs, set(moments), measure
        batches = trainer.args.gradient_accumulation_steps * processes.count()
        self.heaviest = heaviest_step(trainer.train_dataset, trainer.args.per_device_train_batch_size, batches)
        self.peak = PeakMemory(trainer.args.device)
        self.start = 0.0
        self.trains = False  # whether a first step has begun, so that no checkpoint is being read any more
        # AdaLoRA may turn a module off by itself.
        weights = trainer.model.named_parameters() if trainer.allocation is None else ()
        self.zeros = {name: weight for name, weight in weights if weight.requires_grad and not weight.any()}
        if trainer.settings.patience is not None:
            steps = trainer.args.max_steps
            self.moments |= {step for step in range(1, steps + 1) if step % math.ceil(steps / MEASUREMENTS) == 0 or step == steps}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._protect_best(args, state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trains = True
        if state.global_step == self.heaviest:
            self.peak.start()
        self.start = time.perf_counter()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.allocation is not None:
            self.trainer.allocation.after_step(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        trainer, log = self.trainer, self.trainer.log_so_far
        log.seconds += time.perf_counter() - self.start
        (loss,) = processes.total([trainer.step_loss])
        trainer.check_loss(loss, state.global_step)
        log.losses.append(loss)
        log.tokens += trainer.step_tokens
        log.positions += trainer.step_positions
        log.forward_seconds, trainer.forward_seconds = log.forward_seconds + trainer.forward_seconds, 0.0
        log.backward_seconds, trainer.backward_seconds = log.backward_seconds + trainer.backward_seconds, 0.0
        if state.global_step == self.heaviest + 1:
            # Between steps there are the adapters and the optimiser's state; the peak is what this step took on top of them.
            self.peak.stop()
            weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
            states = [value for state in trainer.optimizer.state_dict()["state"].values() for value in state.values()]
            log.peak_bytes = self.peak.bytes + sum(value.nbytes for value in (*weights, *states) if isinstance(value, torch.Tensor))
        state.epoch = self.epochs * state.global_step / state.max_steps
        if self.progress is not None:
            self.progress("train", state.global_step, state.max_steps)
        if state.global_step == min(IDLE_STEPS, state.max_steps):
            self._look_at_zeros(state.global_step)
        if self.measure is not None and state.global_step in self.moments:
            log.curve.append((state.global_step, log.seconds, processes.of_first(self.measure())))
        patience = trainer.settings.patience
        if patience is not None and state.global_step in [step for _, step in log.watched(state.max_steps)]:
            # A checkpoint goes with every loss that counts, so that the adapter of the best can be had again.
            self._protect_best(args, state)
            control.should_save = True
            control.should_training_stop = control.should_training_stop or log.has_turned(patience, state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        norm = kwargs.get("logs", {}).get("grad_norm")
        if norm is not None and not math.isfinite(norm):
            raise DivergedError(f"the gradient's norm is {norm} at step {state.global_step}; {self.trainer.advice()}")

    def _protect_best(self, args: TrainingArguments, state: TrainerState) -> None:
        """Tell `Trainer` which checkpoint it must not remove; the folder may have been moved since its state was saved."""
        losses = self.trainer.log_so_far.watched(state.max_steps) if self.trainer.settings.patience is not None else []
        state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{min(losses)[1]}") if losses else None

    def _look_at_zeros(self, step: int) -> None:
        """Report adapters that began at zero and still are; raise `TrainingError` if all are."""
        idle = [name for name, weight in self.zeros.items() if not weight.any()]
        if not idle:
            return
        names = [name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default") for name in idle]
        few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        steps = f"{step} step{'s' if step > 1 else ''}"
        if len(idle) == len(self.zeros):
            raise TrainingError(f"no adapter has learnt anything in {steps}: {few} are zero; {self.trainer.advice()}, or check the records")
        line = f"{few} {'are' if len(idle) > 1 else 'is'} still zero after {steps}: no gradient reaches such modules; leave them out"
        logging.getLogger(__name__).warning(line)
        self.trainer.log_so_far.notes.append(line)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        processes.wait()  # each has written the state of its own random numbers
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / LOG_FILE, asdict(self.trainer.log_so_far), force=True)


def check_reporters(settings: TrainSettings) -> list[str]:
    """The places to log to.

    Raises:
        TrainingError: There is no such place, or its package is not installed.
    """
    reporters = settings.reporters()
    for name in reporters if reporters not in (["none"], ["all"]) else []:
        if name not in INTEGRATION_TO_CALLBACK:
            close = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            mend = f"did you mean {close[0]!r}?" if close else "choose tensorboard, wandb or trackio"
            raise TrainingError(f"report_to {name!r} is unknown to transformers; {mend}")
        if name not in get_available_reporting_integrations():
            raise TrainingError(f"report_to {name!r} needs its package, which is not installed; install it or log to 'none'")
    return reporters


def training_arguments(settings: TrainSettings, steps: int, folder: Path, device: torch.device) -> TrainingArguments:
    """Settings as transformers names them, for one device a process and without output of its own.

    Raises:
        TrainingError: The device is not the one that `Trainer` would take or cannot compute in bfloat16, or there is no such place
            to log to.
    """
    reporters = check_reporters(settings)
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size // processes.count(),
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.rate,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=math.ceil(settings.warmup_ratio * steps) if steps > 1 else 0,  # warming up, a first step has a rate of 0
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            optim="adamw_torch",
            seed=settings.seed,
            bf16=settings.bf16,
            use_cpu=device.type == "cpu",
            report_to=reporters,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps" if settings.save_steps else "no",
            save_steps=settings.save_steps or steps,
            save_total_limit=2,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
        )
    except ValueError as error:
        raise TrainingError(f"cannot train with these settings: {' '.join(str(error).split())}; try without bf16") from error
    used = arguments.device
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process drives one device; never DataParallel
    if (used.type, used.index or 0) != (device.type, device.index or 0):
        raise TrainingError(f"the model lies on {device} but transformers trains on {used}; set CUDA_VISIBLE_DEVICES and use --device cuda")
    return arguments
