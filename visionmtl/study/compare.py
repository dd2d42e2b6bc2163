"""A comparison from its plan to its report: train what is missing, choose searched weights, measure costs, write."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from visionmtl.config.loader import ConfigError
from visionmtl.study.affinity import check_affinity, measure_affinity, read_affinity
from visionmtl.study.comparison import PlannedRuns, Variant, key_of
from visionmtl.study.costs import measure_costs, read_costs
from visionmtl.study.report import Measured, SearchedTrial, write_report
from visionmtl.study.runner import Job, Runner
from visionmtl.study.statistics import delta_m_per_task
from visionmtl.study.tables import changes
from visionmtl.study.worker import Result


def compare(
    plan: PlannedRuns, folder: Path, runner: Runner, *, train: bool, with_costs: bool, tell: Callable[[str], None]
) -> list[str]:
    """Do a comparison, or go on with it; returns what failed, a line each. The report is written after each run.

    train: whether missing runs are trained; with_costs: whether steps are timed at the end
    """
    measured = plan.comparison.affinity if train and plan.comparison.affinity in plan.selected else None
    if measured is not None:
        check_affinity(measured, plan.variants[measured].run)
    study = _Study(plan, folder, runner)
    failed: list[str] = []
    if train:
        failed += runner.finish(study.plain_jobs(), study.report)
        failed += runner.finish(study.trial_jobs(), study.report)
        failed += study.undecided_searches()
        failed += runner.finish(study.searched_jobs(), study.report)
    if with_costs:
        measure_costs(folder, {name: study.chosen(one) for name, one in study.selected.items()}, runner, tell)
    if measured is not None:
        measure_affinity(folder, study.affinity_runs(), runner.device, runner.threads, tell)
    study.report()
    return failed


class _Study:
    def __init__(self, plan: PlannedRuns, folder: Path, runner: Runner) -> None:
        self.plan, self.folder, self.runner = plan, folder, runner
        self.seeds = plan.comparison.seeds
        self.selected = {name: one for name, one in plan.variants.items() if name in plan.selected}
        self._reserve_folders()

    def _reserve_folders(self) -> None:
        """Equal runs share the folder of the first in the file, whichever of them is wanted or trained first."""
        for variant in self.plan.variants.values():
            for seed in self.seeds if not variant.trials else ():
                self.runner.place(variant.name, variant.seeded(seed))

    def plain_jobs(self) -> list[Job]:
        """All but searches; seed by seed, so that a table of everything is there early."""
        plain = [variant for variant in self.selected.values() if not variant.trials]
        return [Job(one.name, one.seeded(seed), one.test) for seed in self.seeds for one in plain]

    def trial_jobs(self) -> list[Job]:
        """The trials of all searches, with the first seed; they never see the test data."""
        return [
            Job(f"{variant.name}/trials/{number}", variant.weighted(weights).seeded(self.seeds[0]), None)
            for variant in self.selected.values()
            for number, weights in enumerate(variant.trials)
        ]

    def undecided_searches(self) -> list[str]:
        """Those whose trials are all there and have no score, a line each."""
        return [
            f"{one.name}: none of its {len(one.trials)} trials has a delta_m on the held-out images, since they, or a "
            f"reference with seed {self.seeds[0]}, diverged; no weights are chosen and nothing is trained with them; "
            "lower optim.lr, or choose other ranges of weights"
            for one in self.selected.values()
            if one.trials and len(self.trials(one)) == len(one.trials) and self.chosen(one) is None
        ]

    def searched_jobs(self) -> list[Job]:
        """Each search's best weights, with all seeds."""
        searched = [variant for variant in self.selected.values() if variant.trials]
        chosen = [one for variant in searched if (one := self.chosen(variant))]
        return [Job(one.name, one.seeded(seed), one.test) for one in chosen for seed in self.seeds]

    def chosen(self, variant: Variant) -> Variant | None:
        """The variant that is compared: that of a search with its best weights, None before all trials are finished."""
        if not variant.trials:
            return variant
        trials = self.trials(variant)
        scores = [trial.delta_m for trial in trials]
        if len(trials) < len(variant.trials) or all(score is None for score in scores):
            return None
        best = max((score, -number) for number, score in enumerate(scores) if score is not None)
        # equal trials of one seed take the folder of the first; the rest are new runs
        return variant.weighted(variant.trials[-best[1]])

    def trials(self, variant: Variant) -> list[SearchedTrial]:
        """The finished trials of a search, with delta_m (tasks first) on the held-out images."""
        seed, found = self.seeds[0], []
        references = self._references(variant, seed)
        for number, weights in enumerate(variant.trials):
            run = variant.weighted(weights).seeded(seed)
            result = self.runner.result(f"{variant.name}/trials/{number}", run, None)
            if result is None:
                continue
            score = None
            if not result.diverged and references is not None:
                held_out = {task: of.held_out for task, of in references.items()}
                against = changes(result.held_out, held_out, self.plan.metrics)
                score = delta_m_per_task(against) if against else None
            shown = {name: weights.get(name, task.weight) for name, task in variant.run.tasks.items()}
            found.append(SearchedTrial(number, shown, score, bool(result.diverged)))
        return found

    def _references(self, variant: Variant, seed: int) -> Mapping[str, Result] | None:
        """By task the reference's result with the same seed; None while one is missing."""
        results: dict[str, Result] = {}
        for task in variant.run.tasks:
            name = self.plan.reference(task, variant.fraction)
            if name is None:
                continue
            reference = self.plan.variants[name]
            result = self.runner.result(name, reference.seeded(seed), None)
            if result is None or result.diverged:
                return None
            results[task] = result
        return results or None

    def affinity_runs(self) -> dict[str, Path]:
        """The finished runs whose affinity is wanted, by seed and settings."""
        name = self.plan.comparison.affinity
        assert name is not None
        runs = [self.plan.variants[name].seeded(seed) for seed in self.seeds]
        finished = [run for run in runs if (one := self.runner.result(name, run, None)) and not one.diverged]
        return {key_of(run): self.runner.place(name, run) for run in finished}

    def measured(self) -> list[Measured]:
        """What is finished so far, in the order of the file; also of runs that are not wanted this time."""
        rows = []
        for name, variant in self.plan.variants.items():
            if name in self.selected:
                rows.append(self._measured(variant))
                continue
            with suppress(ConfigError):  # trained with settings other than these, so no run of this comparison
                if (earlier := self._measured(variant)).results:
                    rows.append(earlier)
        return rows

    def _measured(self, variant: Variant) -> Measured:
        chosen = self.chosen(variant)
        results: dict[int, Result] = {}
        for seed in self.seeds if chosen else ():
            assert chosen is not None
            if result := self.runner.result(variant.name, chosen.seeded(seed), chosen.test):
                results[seed] = result
        return Measured(variant, results, self.trials(variant))

    def report(self) -> None:
        """Write all files of the report."""
        affinity = read_affinity(self.folder)
        name = self.plan.comparison.affinity
        runs = [self.plan.variants[name].seeded(seed) for seed in self.seeds] if name else []
        matrices = [affinity[key] for run in runs if (key := key_of(run)) in affinity]
        write_report(self.folder, self.plan, self.measured(), read_costs(self.folder), matrices)
