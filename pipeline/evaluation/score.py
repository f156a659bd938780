"""Scoring: rows of production, raw, to scored rows; and the same rows again, to the same bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline import agreement, parallel
from pipeline.config.schema import RunConfig
from pipeline.data import fingerprint_of
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import DataError
from pipeline.evaluation import judge
from pipeline.evaluation.batches import Batches, batches_again
from pipeline.evaluation.fitted import Fitted, read_fitted
from pipeline.evaluation.inputs import (
    carried_columns,
    own_columns,
    prepare_inputs,
    read_inputs,
    require_usable,
)
from pipeline.evaluation.opening import open_predictor, processes, read_plan
from pipeline.evaluation.predict import Predictor
from pipeline.evaluation.samples import (
    Origin,
    described_by,
    scored_names,
    scored_table,
    scoring_facts,
    with_carried,
    with_metadata,
    write_table,
)
from pipeline.modality.bundle import LabelNames, modality_of
from pipeline.records import RunFolder
from pipeline.trained import model_version, trained_label_names, trained_processor

if TYPE_CHECKING:
    from datasets import Dataset

Say = Callable[[str], None]


def score(
    run: RunFolder,
    config: RunConfig,
    inputs: Sequence[Path],
    output: Path,
    say: Say = lambda sentence: None,
) -> pa.Table | None:
    """Score files of raw rows, and write the scored rows as parquet.

    Args:
        run: an evaluated run.
        config: its configuration.
        inputs: csv, json lines or parquet, with the text column that the model was trained on. A
            label column is optional, and so is `sample_id`; other columns are carried through.
        output: parquet file to write.
        say: receives the few sentences a user should read.

    Returns:
        The table written; None on all processes but the main one.

    Raises:
        DataError: everything that is wrong with the rows.
        RunFolderError: the run has not been trained or evaluated.
    """
    _require_output(output, inputs)
    with processes(config):
        rows, label_names = read_inputs(inputs), trained_label_names(run)
        _require_free_names(rows, config, label_names)
        require_usable(rows, config, label_names)
        scorer = _Scorer.of(run, config)
        prepared = prepare_inputs(rows, config, scorer.processor, scorer.label_names)
        scorer.agree(prepared)
        if parallel.is_main():
            say(f"Scoring {len(prepared)} rows.")
        scored = scorer.score(prepared, scorer.predictor.batches_of(prepared))
        if scored is None:
            return None
        table = scorer.signed(scored, carried_columns(rows, config))
        write_table(output, table)
        return table


def rescore(
    run: RunFolder, config: RunConfig, table: pa.Table, places: Sequence[int]
) -> pa.Table | None:
    """Score chosen rows of a scored table once more, in the very batches of the first time.

    Args:
        run: the run, which must be evaluated.
        config: with the seed, passes and batch size of the first time: see `as_scored`.
        table: all rows of the scored file, in their order.
        places: of the rows wanted, from 0.

    Returns:
        Those rows, in this order: on the same machine bit for bit what was scored, if weights,
        seed, passes and dropout plan are the same. None on all processes but the main one.

    Raises:
        DataError: rows that were in a batch with them are missing.
    """
    with processes(config):
        scorer = _Scorer.of(run, config)
        prepared = _prepared_again(table, config, scorer)
        scorer.agree(prepared)
        batches = _batches_again(table, prepared, scorer.predictor, places)
        found = scorer.score(prepared, batches)
        if found is None:
            return None
        ran = sorted(place for batch in batches for place in batch)
        chosen = [ran.index(place) for place in places]
        return scorer.signed(found.take(pa.array(chosen, pa.int64())), None)


def as_scored(config: RunConfig, metadata: Mapping[str, Any]) -> RunConfig:
    """The configuration with the seed, passes and batch size that scored rows name, if they do."""
    named = {name: value for name, value in metadata.items() if value is not None}
    evaluation = config.evaluation.model_copy(
        update={
            "num_mc_passes": named.get("num_mc_passes", config.evaluation.num_mc_passes),
            "batch_size": named.get("batch_size", config.evaluation.batch_size),
        }
    )
    seed = named.get("seed", config.seed)
    return config.model_copy(update={"seed": seed, "evaluation": evaluation})


@dataclass(frozen=True)
class _Scorer:
    """An evaluated run, opened."""

    config: RunConfig
    plan: DropoutPlan
    processor: Any
    label_names: LabelNames
    fitted: Fitted
    predictor: Predictor

    @classmethod
    def of(cls, run: RunFolder, config: RunConfig) -> "_Scorer":
        plan = read_plan(run, config)
        agreement.agree(agreement.start_facts(config))
        fitted = read_fitted(run, model_version(run))
        processor = trained_processor(run, config)
        predictor = open_predictor(run, config, plan, processor)
        return cls(config, plan, processor, trained_label_names(run), fitted, predictor)

    def agree(self, prepared: "Dataset") -> None:
        """All processes see the same rows, and draw the same masks."""
        seen, device = fingerprint_of({"inputs": prepared}), self.predictor.device
        facts = agreement.run_facts(
            self.plan, self.predictor.monte_carlo.keyed.seed, seen, 0, device
        )
        agreement.agree(facts)

    def score(self, prepared: "Dataset", batches: Batches) -> pa.Table | None:
        """The rows in these batches, in their order; None on all processes but the main one."""
        prediction = self.predictor.predict(prepared, batches)
        if prediction is None or not parallel.is_main():
            return None
        ran = sorted(place for batch in batches for place in batch)
        number = {place: index for index, place in enumerate(ran)}
        among_them = [[number[place] for place in batch] for batch in batches]
        scores = judge.scores_of(prediction, self.fitted.detectors, among_them)
        origin = Origin(
            self.label_names, self.fitted.temperature, described_by(self.config, self.processor)
        )
        return scored_table(prediction, prepared.select(ran), among_them, scores, origin)

    def signed(self, scored: pa.Table, carried: pa.Table | None) -> pa.Table:
        """With the user's columns, saying how it was scored."""
        names = [] if carried is None else carried.column_names
        version, digest = self.fitted.model_version, self.plan.digest
        facts = scoring_facts(self.config, version, digest, self.label_names, names)
        return with_metadata(with_carried(scored, carried), facts)


# -- once more -----------------------------------------------------------------------------------


def _prepared_again(table: pa.Table, config: RunConfig, scorer: _Scorer) -> "Dataset":
    """Scored rows as the model takes them."""
    from datasets import Dataset

    if "input_ids" in table.column_names:
        made = ("text", "sample_id", "input_ids", "label_mask", "image")
        by_tokens = table.select([name for name in made if name in table.column_names])
        return Dataset.from_dict(by_tokens.to_pydict())
    wanted = modality_of(config).inputs(config.data)
    names = {
        key.removesuffix("_column_name").removeprefix("channel_column_names."): column
        for key, column in wanted.items()
    }
    names |= {"label": config.data.label_column_name, "text": config.data.text_column_name}
    kept = [name for name in (*names, "sample_id") if name in table.column_names]
    columns = {names.get(name, name): table[name].to_pylist() for name in kept}
    domain = config.data.domain_column_name
    if domain is not None and domain in table.column_names:
        columns[domain] = table[domain].to_pylist()
    rows = Dataset.from_dict(columns)
    return prepare_inputs(rows, config, scorer.processor, scorer.label_names)


def _batches_again(
    table: pa.Table, prepared: "Dataset", predictor: Predictor, places: Sequence[int]
) -> Batches:
    """The whole batches that hold these rows; rows that production scored remember none."""
    if "batch_key" not in table.column_names:
        wanted = set(places)
        return [batch for batch in predictor.batches_of(prepared) if wanted & set(batch)]
    lengths = predictor.lengths(prepared)
    return batches_again(prepared["sample_id"][:], lengths, table["batch_key"].to_pylist(), places)


# -- refusals ------------------------------------------------------------------------------------


def _require_output(output: Path, inputs: Sequence[Path]) -> None:
    if output.suffix != ".parquet":
        raise DataError(f"Scored rows are written as parquet; name {output} with .parquet.")
    if output.resolve() in {Path(path).resolve() for path in inputs}:
        raise DataError(f"{output} is one of the inputs and would be lost: name another output.")


def _require_free_names(rows: "Dataset", config: RunConfig, label_names: LabelNames) -> None:
    taken = scored_names(modality_of(config), label_names is not None)
    if double := [name for name in own_columns(rows, config) if name in taken]:
        raise DataError(
            f"The inputs have columns that scored rows have too: {', '.join(double)}. Rename "
            "them, or leave them out; rows that are scored already need not be scored again."
        )
