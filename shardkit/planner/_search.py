"""Estimates every layout of a space; a layout that is not legal is kept with its reason."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .._core.row_dims import count_rows
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
    """The candidates of a search, and the reason of every layout that it left out."""

    # legal layouts, estimated
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    # reason → number of layouts, and an example
    rejected: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    considered: int = 0  # number of layouts, legal or not
    problems: tuple[str, ...] = ()  # what could not be costed

    def reject(self, reason: str, example: str, number: int = 1) -> None:
        """Counts layouts that are not legal."""
        before, first = self.rejected.get(reason, (0, example))
        self.rejected[reason] = (before + number, first)
        self.considered += number


@dataclasses.dataclass(frozen=True)
class Family:
    """Layouts that share the symbolic costs of one step, under one remat policy."""

    zero: int  # ZeRO stage
    attention: str  # method of attention along a split length
    staged: bool  # whether layers are split over stages

    @classmethod
    def of(cls, candidate: Candidate) -> "Family":
        """The family of a candidate."""
        return cls(candidate.zero, candidate.attention, candidate.pipeline is not None)

    @property
    def mesh_group(self) -> tuple[bool, bool]:
        """Families with the same value split the same axes."""
        return bool(self.attention), self.staged

    @property
    def traced(self) -> "Family":
        """The family whose costs this one shares: only ZeRO stage 2 reduces gradients otherwise."""
        return dataclasses.replace(self, zero=2 if self.zero == 2 else 0)


@dataclasses.dataclass
class Search:
    """A search for one model on one target."""

    resolver: StateBytesResolver  # the traced spec, and the exact bytes of its layouts
    space: SearchSpace  # the options
    machine: Machine  # the devices
    devices: int  # number of devices
    # remat policies and families that are searched; None for all
    only: frozenset[tuple[str, Family]] | None = None
    # remat policy and family → symbolic costs, or why the loss cannot be traced
    costs: dict[tuple[str, Family], StepCosts | str] = dataclasses.field(default_factory=dict)
    _regions: MarkedRegions | None = None

    @classmethod
    def of(
        cls,
        spec: StepSpec,
        target: Target,
        space: SearchSpace,
        overlap: float,
        hardware: "Sequence[Chip]" = (),
    ) -> "Search":
        """Traces the state of a spec."""
        model = TracedModel.of(spec)
        machine = Machine.of(target, model.compute_dtype, overlap, hardware)
        assert target.n_devices is not None
        return cls(StateBytesResolver(model), space, machine, target.n_devices)

    def run(self, batch_scale: float = 1.0) -> SearchResult:
        """Estimates every layout."""
        result = SearchResult()
        families: dict[Family, list[PlannedCase]] = {}
        for case in self._legal_cases(result):
            family = Family(case.zero, case.attention, case.is_staged)
            families.setdefault(family, []).append(case)
        for family, cases in families.items():
            alike = [f for f in families if f.mesh_group == family.mesh_group]
            mesh = smallest_split_mesh([case.sizes for f in alike for case in families[f]])
            for remat in self.space.remat:
                if self.only is not None and (remat, family) not in self.only:
                    continue
                costs = self._step_costs(remat, family, mesh)
                if isinstance(costs, str):
                    result.reject(costs, f"{cases[0]}, remat={remat}", len(cases))
                else:
                    candidates = self._estimate(costs, remat, cases, batch_scale)
                    result.candidates += candidates
                    result.considered += len(candidates)
        problems = (text for costs in self._traced_costs() for text in costs.problems)
        result.problems = tuple(dict.fromkeys(problems))
        return result

    def estimate_again(self, candidate: Candidate, batch_scale: float) -> Candidate:
        """A candidate of this search, as if the batch had so many times its rows."""
        costs = self.costs[candidate.remat, Family.of(candidate).traced]
        exact = self.resolver.resolve(candidate.mesh, candidate.zero)
        assert isinstance(costs, StepCosts)
        assert isinstance(exact, StateBytes)
        batching = candidate.pipeline or candidate.accumulate
        case = PlannedCase(candidate.mesh, batching, candidate.zero, candidate.attention, exact)
        return self._estimate(costs, candidate.remat, [case], batch_scale)[0]

    def _estimate(
        self, costs: StepCosts, remat: str, cases: Sequence[PlannedCase], batch_scale: float
    ) -> list[Candidate]:
        """Estimates cases; each candidate has the code that declares it."""
        candidates = estimate_cases(costs, remat, cases, self.machine, batch_scale)
        return [
            dataclasses.replace(candidate, declaration=case.declaration(remat))
            for candidate, case in zip(candidates, cases, strict=True)
        ]

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        model = self.resolver.model
        return max(count_rows(model.spec.batch, model.row_dims), default=0)

    @property
    def lengths(self) -> frozenset[int]:
        """Sizes of the dims that the model names `length`, known after a run."""
        return frozenset().union(*(costs.lengths for costs in self._traced_costs()))

    def _traced_costs(self) -> Iterator[StepCosts]:
        return (costs for costs in self.costs.values() if isinstance(costs, StepCosts))

    def with_length(self, factor: float, like: Iterable[Candidate]) -> "Search | None":
        """The same search for rows `factor` times as long; None where the batch has no such dim.

        Only families of the candidates `like` are searched, since each is traced anew.
        """
        model = self.resolver.model.with_length(self.lengths, factor)
        if model is None:
            return None
        # No parameter depends on the length.
        resolver = StateBytesResolver(model, self.resolver.cache)
        only = frozenset((candidate.remat, Family.of(candidate)) for candidate in like)
        return dataclasses.replace(self, resolver=resolver, only=only, costs={}, _regions=None)

    def _legal_cases(self, result: SearchResult) -> Iterator[PlannedCase]:
        """Every mesh with every option; those that are not legal go to `result` instead."""
        updating = axes_splitting("rows", "optimizer_state")
        for zero in self.space.zero:
            for sizes in self.space.meshes(self.devices):
                if zero and max(sizes.get(axis, 1) for axis in updating) == 1:
                    continue  # ZeRO has no axis to split over
                methods, batchings = (
                    self.space.attention_methods(sizes),
                    self.space.batchings(sizes),
                )
                exact = self._resolve(sizes, zero)
                if isinstance(exact, str):
                    number = len(methods) * len(batchings) * len(self.space.remat)
                    result.reject(exact, str(PlannedCase(sizes)), number)
                    continue
                for method in methods:
                    for batching in batchings:
                        case = PlannedCase(sizes, batching, zero, method, exact)
                        if problem := self._option_problem(case):
                            result.reject(problem, str(case), len(self.space.remat))
                        else:
                            yield case

    def _resolve(self, sizes: Mapping[str, int], zero: int) -> StateBytes | str:
        if self.machine.network.crossing_axis(sizes) == "":
            return f"no axis is a multiple of the {self.machine.network.slices} slices"
        splits_regions = max(sizes.get(axis, 1) for axis in region_axes()) > 1
        problem = self._marked_regions().axis_problem(sizes) if splits_regions else ""
        return problem or self.resolver.resolve(sizes, zero)

    @property
    def has_experts(self) -> bool:
        """Whether the loss has experts that a mesh axis can divide."""
        return bool(self._marked_regions().experts)

    def _marked_regions(self) -> MarkedRegions:
        """The regions that the model marks, traced at the first call."""
        if self._regions is None:
            try:
                self._regions = self.resolver.model.regions()
            except Exception as error:  # the loss is a user's code
                self._regions = MarkedRegions(error=first_reason(error))
        return self._regions

    def _option_problem(self, case: PlannedCase) -> str:
        shards = count_row_shards(case.sizes)
        if self.rows % (shards * case.batching.micro_batches):
            return f"a batch of {self.rows} rows that does not split into devices x micro-batches"
        if max(case.sizes.get(axis, 1) for axis in region_axes()) == 1:
            return ""
        return self._marked_regions().option_problem(case.sizes, case.batching, case.attention)

    def _step_costs(self, remat: str, family: Family, sizes: Mapping[str, int]) -> StepCosts | str:
        """Symbolic costs for all meshes, or why the loss cannot be traced."""
        key = (remat, family.traced)
        if key not in self.costs:
            has_state_axis = not {*axes_splitting("optimizer_state")}.isdisjoint(sizes)
            zero = family.traced.zero if has_state_axis else 0
            model, tile_width = self.resolver.model, self.machine.network.tile_width
            strategy = make_strategy(sizes, zero, family.attention, like=model.spec.strategy)
            try:
                flat = model.program(remat, bool(family.attention))
                layout = model.layout(sizes, strategy)
            except Exception as error:  # the loss is a user's code
                self.costs[key] = first_reason(error)
            else:
                self.costs[key] = propagate_step(
                    flat, layout, strategy, tile_width=tile_width, attention=family.attention
                )
        return self.costs[key]
