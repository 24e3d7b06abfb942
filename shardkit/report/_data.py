"""`ReportData`: everything that a report holds, as plain data that functions read."""

import dataclasses
from collections.abc import Mapping

from ._saved import LeafLayout, TickTable
from .communication._axis_traffic import AxisTraffic, measure_traffic
from .communication._ledger import Ledger
from .communication._minimum import Minimum
from .findings._finding import Finding
from .memory._memory import Memory
from .memory._peak import Peak
from .time._flops import Flops
from .time._profile import MeasuredTimes
from .time._timeline import Timeline


@dataclasses.dataclass(frozen=True)
class ReportData:
    """The fields of a `Report`, which adds the methods that print, save and check it.

    Attributes:
      mesh: names and sizes of the mesh axes.
      platform: what it was compiled for: `"cpu"`, `"tpu"`, `"gpu"`.
      device_kind: the device's own name.
      ledger: every collective.
      memory: bytes per device.
      flops: FLOPs of a step, all devices together; None without a jaxpr.
      findings: what a user would want to know, the most bytes first; before these, what a
        declaration causes that all others disagree with.
      kept: what is to be kept as it is: nothing that can be declared otherwise sends less, as far
        as is known, or none of the fixes that `try_fixes` compiled.
      minima: textbook minimum of each axis whose kind is declared.
      reductions: axis that splits the batch → how often each gradient is reduced over it.
      leaves: every array of the step's input and its layout on the mesh.
      notes: what the step takes otherwise than its caller or its model wrote it.
      memory_suggestions: changes that make a step fit which exceeds its device.
      ticks: the schedules of its pipelines.
      compiles: how often the step was compiled.
      messages_complete: the compiler's messages are known, so that no finding is missing.
      peak: the buffers that are alive when memory peaks; None where the schedule is not known.
      timeline: the modelled step time; None for a device that is not in the hardware table.
      measured: times of a profile of the step, as `Report.with_profile` reads them.
      name: of the config or model, where it has one; not part of what is compared.
      made: `date` and versions of the packages that compiled it; not part of what is compared.
      seconds: wall time that this machine took to `trace`, `lower` and `compile` the step, as far
        as known, and to `read` the compiled program; not part of what is compared.
    """

    mesh: tuple[tuple[str, int], ...]
    platform: str
    device_kind: str
    ledger: Ledger
    memory: Memory
    flops: Flops | None
    findings: tuple[Finding, ...]
    minima: tuple[Minimum, ...] = ()
    reductions: Mapping[str, float] = dataclasses.field(default_factory=dict)
    leaves: tuple[LeafLayout, ...] = ()
    notes: tuple[str, ...] = ()
    memory_suggestions: tuple[str, ...] = ()
    compiles: int = 1
    kept: tuple[Finding, ...] = ()
    messages_complete: bool = True
    ticks: tuple[TickTable, ...] = ()
    timeline: Timeline | None = None
    peak: Peak | None = None
    measured: MeasuredTimes | None = None
    name: str = dataclasses.field(default="", compare=False)
    made: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read or counted; with any, some totals are lower bounds."""
        uncounted = self.flops.problems if self.flops else ()
        return self.ledger.problems + self.memory.problems + uncounted

    @property
    def sent(self) -> int:
        """Bytes that one device sends per step, the optimizer's among them."""
        return self.ledger.total()

    @property
    def traffic(self) -> tuple[AxisTraffic, ...]:
        """What one device sends over each mesh axis; adds up to `sent`."""
        params = [leaf for leaf in self.leaves if leaf.part == "params"]
        splitting = {axis for leaf in params for axes in leaf.spec for axis in axes}
        return measure_traffic(self.ledger, splitting, self.minima, self.reductions)

    @property
    def mesh_text(self) -> str:
        """Returns `data=2, tensor=4`."""
        return ", ".join(f"{name}={size}" for name, size in self.mesh)
