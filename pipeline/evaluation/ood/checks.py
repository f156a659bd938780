"""What every feature detector asks of its input."""

from torch import Tensor


def check_features(
    features: Tensor,
    verb: str,
    labels: Tensor | None = None,
    num_dimensions: int | None = None,
) -> None:
    """Features are [N, D], finite, of the fitted width; labels, where given, [N] and >= 0."""
    if features.dim() != 2 or (verb == "fit" and len(features) == 0):
        raise ValueError(f"Features to {verb} have shape [N, D]; got {list(features.shape)}.")
    if num_dimensions is not None and features.shape[1] != num_dimensions:
        raise ValueError(
            f"The detector was fitted on {num_dimensions} features a row; got {features.shape[1]}."
        )
    if not features.isfinite().all():
        rows = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"Features to {verb} are NaN or infinite in {len(rows)} of {len(features)} rows (the "
            f"first is row {rows[0]}); check the model's output before asking for these scores."
        )
    if labels is not None and (labels.shape != features.shape[:1] or labels.min() < 0):
        raise ValueError(
            f"Labels are one class number >= 0 a row, for {len(features)} rows; "
            f"got shape {list(labels.shape)}."
        )
