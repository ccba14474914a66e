"""What every adapter method must do on a model, found by doing it; for tests, for the table of methods, for plug-ins.

report = check("lora", Subject(make, outputs, loss, batches))
assert not report.faults
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .apply import active, add_adapter, load_adapter, save_adapter, state_of, trainable, unsaved
from .behaviour import Calibration, Driver, behaviour_of, driver_of, quiet
from .errors import AdapterError
from .merging import merge
from .modes import training_mode
from .registry import build_config, find_method
from .swapping import AdapterSlot

STEPS = 3


@dataclass(frozen=True)
class Subject:
    """A model to try methods on.

    Attributes:
        make: gives the same frozen base again and again.
        outputs: of a model on fixed inputs, comparable between base and adapter.
        loss: of a model on one batch; parameters must matter to it.
        batches: dicts of tensors; the first is trained on, and methods that look at data see all.
        task_type: PEFT's name for the task.
        original: the base's weights before it was quantised, by name.
        tolerance: of float rounding in outputs.
        merges: whether the base can hold a merged weight exactly; a quantised one rounds it again.
        learning_rate: of the training steps, in which the loss must fall.
    """

    make: Callable[[], nn.Module]
    outputs: Callable[[nn.Module], Tensor]
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    batches: list[dict[str, Tensor]]
    task_type: str | None = None
    original: Callable[[str], Tensor | None] | None = None
    tolerance: float = 1e-5
    merges: bool = True
    learning_rate: float = 1e-2

    def calibration(self) -> Calibration:
        """The subject's data as methods see it."""
        return Calibration(self.batches, self.loss, self.original)


@dataclass
class Report:
    """What was found.

    Attributes:
        faults: promises that were broken; empty for a method that works.
        fresh: "no-op", or why it is none.
        merges: "yes", or why not.
        second: whether a second adapter of the method lives beside the first: "yes", or why not.
        stock: whether stock PEFT loads it: "yes", or what it needs.
        swaps: whether another one of its form can take its place (`AdapterSlot`): "yes", or why not.
        parameters: how many train.
    """

    faults: list[str] = field(default_factory=list)
    fresh: str = ""
    merges: str = ""
    second: str = ""
    stock: str = ""
    swaps: str = ""
    parameters: int = 0


def check(name: str, subject: Subject, options: Mapping[str, Any] | None = None) -> Report:
    """Add, train three steps, switch off, save, load under another name, merge, add a second one.

    Raises:
        AdapterError: the method refuses the model or the options.
    """
    torch.manual_seed(0)
    run = _Run(name, subject, dict(options or {}))
    with quiet():
        run.start()
        run.train()
        run.switch_off()
        run.save_and_load()
        if subject.merges:
            run.merge()
        run.second()
        run.folder.cleanup()
    return run.report


class _Run:
    def __init__(self, name: str, subject: Subject, options: dict[str, Any]) -> None:
        self.name, self.subject, self.options = name, subject, options
        self.report = Report()
        self.base = subject.make()
        held = (*self.base.named_parameters(), *self.base.named_buffers())
        self.weights = {n: (p, p.detach().clone()) for n, p in held}
        self.reference = self._outputs(self.base)

    def _outputs(self, model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return self.subject.outputs(model).float()

    def _config(self, model: nn.Module) -> Any:
        config = build_config(self.name, self.options, self.subject.task_type, model)
        behaviour_of(config).prepare(config, 2 * STEPS)
        return config

    def _fault(self, bad: bool, what: str) -> None:
        if bad:
            self.report.faults.append(what)

    def _far(self, a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / self.reference.abs().max().clamp_min(1.0))

    def start(self) -> None:
        """A fresh adapter is a no-op, or its behaviour says why not."""
        config = self._config(self.base)
        said = behaviour_of(config).changes_outputs
        self.model = add_adapter(self.base, config, data=self.subject.calibration())
        moved = self._far(self._outputs(self.model), self.reference)
        self._fault(moved > self.subject.tolerance and not said, f"a fresh adapter moves outputs by {moved:.1e}")
        self._fault(moved == 0 and bool(said), "a fresh adapter is a no-op, but its behaviour denies it")
        self.report.fresh = said or "no-op"
        self.report.parameters = sum(p.numel() for _, p in trainable(self.model))
        for lost in unsaved(self.model):
            self._fault(True, f"{lost} trains but would not be saved")

    def train(self) -> None:
        """Every trained tensor gets a gradient, the loss falls, the base keeps its bits."""
        driver, named = driver_of(self.model), list(trainable(self.model))
        before = [p.detach().clone() for _, p in named]
        optimizer = torch.optim.AdamW([p for _, p in named], lr=self.subject.learning_rate, weight_decay=0.0)
        training_mode(self.model)
        losses = [self._step(driver, optimizer, named, step) for step in range(1, STEPS + 1)]
        driver.finish()
        still = all(torch.equal(p, b) for (_, p), b in zip(named, before, strict=True))
        self._fault(still, "training moves no parameter")
        self._fault(not losses[-1] < losses[0], f"three steps take the loss from {losses[0]:.5f} to {losses[-1]:.5f}")
        changed = [n for n, (p, value) in self.weights.items() if not torch.equal(p, value)]
        self._fault(bool(changed), f"training changed {len(changed)} base tensors, for example {changed[:1]}")
        self.trained = self._outputs(self.model)
        self._fault(self._far(self.trained, self.reference) == 0, "training does not change the outputs")

    def _step(self, driver: Driver, optimizer: Any, named: list[tuple[str, nn.Parameter]], step: int) -> float:
        loss: Any = self.subject.loss(self.model, self.subject.batches[0])
        penalty = driver.penalty()
        (loss if penalty is None else loss + penalty).backward()
        dead = [n for n, p in named if p.grad is None]
        self._fault(step == 1 and bool(dead), f"no gradient reaches {len(dead)} tensors, for example {dead[:1]}")
        driver.before_step()
        optimizer.step()
        driver.after_step(step)
        optimizer.zero_grad()
        return float(loss.detach())

    def switch_off(self) -> None:
        """Switched off, the model is the base to the last bit."""
        before = [n for n, _ in trainable(self.model)]
        with self.model.disable_adapter():
            off = self._far(self._outputs(self.model), self.reference)
        self._fault(off != 0, f"switched off, outputs differ from the base by {off:.1e}")
        again = self._far(self._outputs(self.model), self.trained)
        self._fault(again != 0, f"switched on again, outputs differ by {again:.1e}")
        other = set(before) ^ {n for n, _ in trainable(self.model)}
        self._fault(
            bool(other), f"switched on again, {len(other)} other tensors train, for example {sorted(other)[:1]}"
        )

    def save_and_load(self) -> None:
        """Saved, loaded under another name by us and by stock PEFT, it gives the same outputs."""
        self.folder = tempfile.TemporaryDirectory()
        save_adapter(self.model, self.folder.name)
        loaded = load_adapter(self.subject.make(), self.folder.name, "another")
        off = self._far(self._outputs(loaded), self.trained)
        self._fault(off > self.subject.tolerance, f"loaded under another name, outputs differ by {off:.1e}")
        self._swap(loaded)
        # Ours are known to PEFT once this package has registered them.
        ours = find_method(self.name).plug_in
        try:
            stock = PeftModel.from_pretrained(self.subject.make(), self.folder.name, adapter_name="third")
            off = self._far(self._outputs(stock), self.trained)
        except (ValueError, AttributeError) as error:  # PEFT hides a convolution's stride from MobileNetV2
            self.report.stock = str(error)
            return
        self._fault(off > self.subject.tolerance, f"stock PEFT's outputs differ by {off:.1e}")
        self.report.stock = "after import" if ours else "yes"

    def _swap(self, loaded: PeftModel) -> None:
        """Put in the place of another of its form, it gives the same outputs, or a place is refused with a reason."""
        try:
            slot = AdapterSlot(loaded, "another")
        except AdapterError as error:
            self.report.swaps = str(error)
            return
        with torch.no_grad():
            for held in state_of(loaded, "another").values():
                held.add_(held.is_floating_point())
        self._fault(self._far(self._outputs(loaded), self.trained) == 0, "other numbers give the same outputs")
        slot.put(self.folder.name)
        off = self._far(self._outputs(loaded), self.trained)
        self._fault(off > self.subject.tolerance, f"put in the place of another, outputs differ by {off:.1e}")
        self.report.swaps = "yes"

    def merge(self) -> None:
        """Merged, it gives the same outputs, or merging refuses with a reason."""
        try:
            merged = merge(load_adapter(self.subject.make(), self.folder.name))
        except AdapterError as error:
            self.report.merges = str(error).split("cannot be merged: ")[-1]
            self._fault(not self.report.merges, "merging fails without a reason")
            return
        off = self._far(self._outputs(merged), self.trained)
        self._fault(off > self.subject.tolerance, f"merged, outputs differ by {off:.1e}")
        self.report.merges = "yes"

    def second(self) -> None:
        """A second adapter of the method leaves the first as it is."""
        try:
            add_adapter(self.model, self._config(self.model), "second", data=self.subject.calibration())
        except (AdapterError, ValueError) as error:
            self.report.second = str(error).removeprefix("the adapter does not fit this model: ").split(". ")[0]
            return
        with active(self.model, "default"):
            off = self._far(self._outputs(self.model), self.trained)
        self._fault(off != 0, f"beside a second adapter, outputs differ by {off:.1e}")
        self.report.second = "yes"
