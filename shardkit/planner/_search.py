"""Stage one: every layout of a space, estimated; what cannot be is kept with its reason."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax

from ..mesh import Target
from ..parallel import axes_splitting
from ..step import StepSpec
from ._candidate import Candidate
from ._cases import PlannedCase, estimate_cases
from ._estimate import Machine
from ._region_probe import MarkedRegions
from ._space import SearchSpace, make_strategy, region_axes, smallest_split_mesh
from ._state_bytes import StateBytes, StateBytesResolver, count_row_shards, first_reason
from ._trace import StepCosts, TracedModel, propagate_step

if TYPE_CHECKING:
    from ..hardware import Chip


@dataclasses.dataclass
class SearchResult:
    """What a search found, with every reason for what it left out."""

    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    rejected: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    considered: int = 0
    problems: tuple[str, ...] = ()

    def reject(self, why: str, example: str, number: int = 1) -> None:
        """Notes layouts that cannot be."""
        before, first = self.rejected.get(why, (0, example))
        self.rejected[why] = (before + number, first)
        self.considered += number


@dataclasses.dataclass(frozen=True)
class Family:
    """Layouts that one walk serves, under one remat policy.

    Attributes:
      zero: ZeRO stage.
      attention: how attention looks along a split length.
      piped: whether layers are in stages.
    """

    zero: int
    attention: str
    piped: bool

    @classmethod
    def of(cls, one: Candidate) -> "Family":
        """The family of a candidate."""
        return cls(one.zero, one.attention, one.pipeline is not None)

    @property
    def meshes(self) -> tuple[bool, bool]:
        """What tells whose axes are split."""
        return bool(self.attention), self.piped

    @property
    def walk(self) -> "Family":
        """Gradients are reduced as parameters lie but with stage 2."""
        return dataclasses.replace(self, zero=2 if self.zero == 2 else 0)


@dataclasses.dataclass
class Search:
    """A search for one model on one target.

    Attributes:
      places: the traced spec, and what was resolved of it.
      space: what is tried.
      machine: the devices.
      devices: their number.
      only: remat policies and families that are looked at; None for all.
    """

    places: StateBytesResolver
    space: SearchSpace
    machine: Machine
    devices: int
    only: frozenset[tuple[str, Family]] | None = None
    walks: dict[tuple[str, Family], StepCosts | str] = dataclasses.field(default_factory=dict)
    marks: list[MarkedRegions] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls,
        declared: StepSpec,
        target: Target,
        space: SearchSpace,
        overlap: float,
        hardware: "Sequence[Chip]" = (),
    ) -> "Search":
        """Traces the state of a spec."""
        machine = Machine.of(target, declared.precision.compute_dtype, overlap, hardware)
        assert target.n_devices is not None
        return cls(StateBytesResolver(TracedModel.of(declared)), space, machine, target.n_devices)

    def run(self, batch_scale: float = 1.0) -> SearchResult:
        """Estimates everything."""
        found = SearchResult()
        families: dict[Family, list[PlannedCase]] = {}
        for one in self._legal(found):
            family = Family(one.zero, one.attention, one.staged)
            families.setdefault(family, []).append(one)
        for family, cases in families.items():
            alike = [f for f in families if f.meshes == family.meshes]
            sizes = [one.sizes for f in alike for one in families[f]]
            for remat in self.space.remat:
                if self.only is not None and (remat, family) not in self.only:
                    continue
                walked = self._walked(remat, family, smallest_split_mesh(sizes))
                if isinstance(walked, str):
                    found.reject(walked, f"{cases[0]}, remat={remat}", len(cases))
                else:
                    made = estimate_cases(walked, remat, cases, self.machine, batch_scale)
                    found.candidates += made
                    found.considered += len(made)
        walks = [one for one in self.walks.values() if isinstance(one, StepCosts)]
        found.problems = tuple(dict.fromkeys(text for one in walks for text in one.problems))
        return found

    def again(self, one: Candidate, batch_scale: float) -> Candidate:
        """A candidate that this search found, as if the batch had so many times its rows."""
        walked = self.walks[one.remat, Family.of(one).walk]
        own = self.places.of(one.mesh, one.zero)
        assert isinstance(walked, StepCosts)
        assert isinstance(own, StateBytes)
        case = PlannedCase(one.mesh, one.pipeline or one.accumulate, one.zero, one.attention, own)
        return estimate_cases(walked, one.remat, [case], self.machine, batch_scale)[0]

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        leaves = jax.tree.leaves(self.places.model.declared.batch)
        return next((x.shape[0] for x in leaves if x.shape), 0)

    @property
    def lengths(self) -> frozenset[int]:
        """Sizes of the dims that the model names `length`, once it was walked through."""
        found = [one.lengths for one in self.walks.values() if isinstance(one, StepCosts)]
        return frozenset().union(*found)

    def of_length(self, factor: float, like: Iterable[Candidate]) -> "Search | None":
        """The same search for rows of another length; None where the batch has no such dim.

        Args:
          factor: how many times the length.
          like: candidates whose families are looked at, since each is traced anew.
        """
        model = self.places.model.of_length(self.lengths, factor)
        if model is None:
            return None
        # No parameter knows the length.
        places = StateBytesResolver(model, self.places.made)
        only = frozenset((one.remat, Family.of(one)) for one in like)
        return dataclasses.replace(self, places=places, only=only, walks={}, marks=[])

    def _legal(self, found: SearchResult) -> Iterator[PlannedCase]:
        """Every mesh with everything that is tried on it, but what cannot be."""
        updating = axes_splitting("rows", "optimizer_state")
        for zero in self.space.zero:
            for sizes in self.space.meshes(self.devices):
                if zero and max(sizes.get(axis, 1) for axis in updating) == 1:
                    continue  # ZeRO means nothing there
                ways, hows = self.space.ways(sizes), self.space.schedules(sizes)
                placed = self._placed(sizes, zero)
                if isinstance(placed, str):
                    number = len(ways) * len(hows) * len(self.space.remat)
                    found.reject(placed, str(PlannedCase(sizes)), number)
                    continue
                for way in ways:
                    for how in hows:
                        one = PlannedCase(sizes, how, zero, way, placed)
                        if why := self._misfit(one):
                            found.reject(why, str(one), len(self.space.remat))
                        else:
                            yield one

    def _placed(self, sizes: Mapping[str, int], zero: int) -> StateBytes | str:
        if self.machine.network.crossing(sizes) == "":
            return f"no axis is a multiple of the {self.machine.network.slices} slices"
        return self._unmarked(sizes) or self.places.of(sizes, zero)

    def _unmarked(self, sizes: Mapping[str, int]) -> str:
        """Why an axis has no part of the model to divide; empty where all have."""
        if max(sizes.get(axis, 1) for axis in region_axes()) == 1:
            return ""
        return self._marked().misses(sizes)

    @property
    def has_experts(self) -> bool:
        """Whether the loss has experts that a mesh axis may divide."""
        return bool(self._marked().experts)

    def _marked(self) -> MarkedRegions:
        """What the model marks, found when it is first asked for."""
        if not self.marks:
            try:
                self.marks.append(self.places.model.marked())
            except Exception as error:  # the loss is a user's code
                self.marks.append(MarkedRegions(broken=first_reason(error)))
        return self.marks[0]

    def _misfit(self, one: PlannedCase) -> str:
        ways = count_row_shards(one.sizes)
        if self.rows % (ways * one.how.micro_batches):
            return f"a batch of {self.rows} rows that does not split into devices x micro-batches"
        split = max(one.sizes.get(axis, 1) for axis in region_axes()) > 1
        return self._marked().misfit(one.sizes, one.how, one.attention) if split else ""

    def _walked(self, remat: str, family: Family, sizes: Mapping[str, int]) -> "Walked | str":
        """One walk for all meshes, or why the loss cannot be traced."""
        key = (remat, family.walk)
        if key not in self.walks:
            stage = family.walk.zero if {*axes_splitting("optimizer_state")} & sizes.keys() else 0
            strategy = make_strategy(sizes, stage, family.attention)
            model = self.places.model
            try:
                flat = model.program(remat, bool(family.attention))
                layout = model.layout(sizes, strategy)
            except Exception as error:  # the loss is a user's code
                self.walks[key] = first_reason(error)
            else:
                lanes = self.machine.network.lanes
                self.walks[key] = propagate_step(flat, layout, strategy, lanes, family.attention)
        return self.walks[key]
