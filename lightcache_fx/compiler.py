"""Makes the programs of a module: captures a call, plans, and builds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lightcache_fx.budgets import for_branches, with_memory
from lightcache_fx.calls import Call
from lightcache_fx.capture import Capture, capture
from lightcache_fx.compiled import Compiled, Signature
from lightcache_fx.cuts import paths_to_mark
from lightcache_fx.dynamic import DynamicSizes, may_be_dynamic
from lightcache_fx.errors import NotCalledError
from lightcache_fx.fetching import WeightsAway
from lightcache_fx.homes import Homes
from lightcache_fx.ledger import Ledger
from lightcache_fx.outputs import register_distributions
from lightcache_fx.placement import weights_fit
from lightcache_fx.plan import Plan, make_plan
from lightcache_fx.policy import Policy
from lightcache_fx.program import BoundProgram, build_programs
from lightcache_fx.program_log import log_programs
from lightcache_fx.repertoire import Repertoire
from lightcache_fx.schedule import Schedules
from lightcache_fx.warming import warm

log = logging.getLogger(__name__)


class Compiler(Repertoire):
    """A repertoire that grows: what there are no programs for is captured.

    Args:
        module: as for `Repertoire`; so are `policy`, `method`, `homes` and `ledger`.
        varying: by an argument's name, dimensions whose sizes are known to vary before a second one comes.

    Raises:
        CutError: the policy cuts at a module path that does not exist.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: Policy,
        method: str = "forward",
        *,
        homes: Homes | None = None,
        ledger: Ledger | None = None,
        varying: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        register_distributions()
        super().__init__(module, policy, method, homes=homes, ledger=ledger)
        self._marked = paths_to_mark(policy.caches, module)
        self._told_of_values = False
        self._sizes: DynamicSizes | None = None
        if may_be_dynamic(policy, method):
            self._sizes = DynamicSizes(module, policy, self._marked, self._compiled, varying or {})

    def build(self, call: Call) -> Compiled:
        """Capture a call, plan, and build; or find that a capture of sizes that vary holds for it."""
        warm(self.policy.compile, self.homes.device)
        away = self._left_away()
        self.ledger.let_go()
        if away is None and self.homes.device.type != "cpu":
            self.recall()  # to be run as it is, beside the capture
        if self._sizes is not None:
            found = self._sizes.programs_for(call, list(self.compiled.values()), self.state)
            if found is not None:
                return found
        captured = capture(self.module, call, mark=self._marked, away=away)
        self._tell_of_values(captured)
        signature = Signature(captured, self._planned(captured), self.state)
        plan = with_memory(captured, signature.plan, takes_turns=self.ledger.is_shared)
        for note in plan.notes:
            log.warning("%s", note)
        return self._compiled(signature, plan)

    def plan_anew(self, compiled: Compiled, branches: int, beside: int) -> Compiled:
        """Of the same capture."""
        signature, captured, turns = compiled.signature, compiled.capture, self.ledger.is_shared
        assert isinstance(captured, Capture)
        asked = replace(signature.plan, branches=branches, beside=beside)
        plan = for_branches(captured, asked, compiled.plan, takes_turns=turns)
        for note in plan.notes:
            if note not in compiled.plan.notes:
                log.warning("%s", note)
        return self._compiled(signature, plan)

    def _tell_of_values(self, captured: Capture) -> None:
        """Warn once where calls of the same sizes may have to be captured anew, which takes as long as the first."""
        if captured.readings is not None and not self._told_of_values:
            self._told_of_values = True
            log.warning(
                "%s decides by the values of %s what it computes: where these are others, calls are captured anew, and"
                " max_signatures=%d of them are held",
                self.reader.owner,
                ", ".join(sorted(captured.readings.arguments)),
                self.policy.max_signatures,
            )

    def _planned(self, captured: Capture) -> Plan:
        """The plan for a call; one that skips what other calls keep, as skip-layer guidance does, has every step full.

        Raises:
            CutError: the cut cannot be made; or no call has had it yet, so it may be mistaken.
        """
        try:
            return make_plan(captured, self.policy, self.module)
        except NotCalledError as error:
            with self._lock:
                if all(made.plan.cut is None for made in self.compiled.values()):
                    raise
            plan = make_plan(captured, self.policy.with_cache(None), self.module)
            note = (
                f"every step of these calls of {self.reader.owner} is full: calls with other arguments have what is to"
                f" be kept, these have not ({error})"
            )
            schedule = Schedules.of(self.policy.caches)
            return replace(plan, policy=self.policy, schedule=schedule, notes=(*plan.notes, note))

    def _compiled(self, signature: Signature, plan: Plan) -> Compiled:
        captured = signature.capture
        assert isinstance(captured, Capture)
        programs = build_programs(captured, plan)
        names = [leaf.name for leaf in captured.layout.leaves]
        bound: dict[str, BoundProgram] = {}
        for name, program in programs.items():  # the full one comes before the others that make slots
            bound[name] = BoundProgram(
                program, self.module, captured.constants, names, settings=self.policy.compile, beside=bound.get("full")
            )
        log_programs(plan, programs)
        made = Compiled(signature, plan, programs, bound)
        made.note_places()
        return made

    def _left_away(self) -> WeightsAway | None:
        """What a capture leaves where it is: the weights of a module in host memory, and those that would not fit."""
        device = self.homes.device
        if device.type == "cpu" or not self.policy.swaps_weights():
            return None
        fits = not self.placement.hosted and weights_fit(self.homes.all_weights(), device, self.policy)
        return None if fits else WeightsAway(device)
