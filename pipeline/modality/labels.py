"""Labels of raw rows: names of the classes, the class of each row, what is wrong with them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

NUM_SHOWN = 10


def label_names_of(rows: "Dataset", column: str) -> tuple[str, ...]:
    """ClassLabel: its own names. Strings: sorted. Integers: the values in order, as text."""
    from datasets import ClassLabel

    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    values = {value for value in label_values(rows, column) if value is not None}
    if len({type(value) for value in values}) > 1:
        values = {str(value) for value in values}  # the mixture is reported by `label_problems`
    return tuple(str(value) for value in sorted(values))


def label_values(rows: "Dataset", column: str) -> list[Any]:
    """A row's class name or integer; None where it is missing (null, NaN, ClassLabel -1)."""
    from datasets import ClassLabel

    values = rows[column][:]
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return [None if _missing(value) else feature.names[value] for value in values]
    return [None if value is None or value != value else _whole(value) for value in values]


def label_numbers(rows: "Dataset", column: str, names: tuple[str, ...]) -> list[int]:
    """The number of each row's class."""
    number = {name: index for index, name in enumerate(names)}
    return [number[str(value)] for value in label_values(rows, column)]


def label_problems(rows: "Dataset", column: str, names: tuple[str, ...]) -> Iterator[str]:
    """Sentences about labels that are missing, of several types, or not among the names."""
    values = label_values(rows, column)
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        where = row_list(missing)
        yield f"column {column!r} has no label in {where}; label these rows or leave them out"
    first_of_type: dict[type, int] = {}
    for row, value in enumerate(values):
        if value is not None:
            first_of_type.setdefault(type(value), row)
    odd = [kind for kind in first_of_type if kind not in (str, int, bool)]
    if odd:
        example = values[first_of_type[odd[0]]]
        yield (
            f"column {column!r} holds {odd[0].__name__} values such as {example!r}; "
            "labels are class names or whole numbers"
        )
    elif len(first_of_type) > 1:
        found = ", ".join(
            f"{kind.__name__} {values[row]!r} in row {row}" for kind, row in first_of_type.items()
        )
        yield f"column {column!r} mixes types of labels ({found}); use one type"
    else:
        yield from _outside(values, column, names)


def row_list(rows: list[int], kind: str = "row") -> str:
    """`row 3`, or `rows 3, 5, 8`, or the first ten and how many more."""
    shown = ", ".join(str(row) for row in rows[:NUM_SHOWN])
    more = f" and {len(rows) - NUM_SHOWN} more" if len(rows) > NUM_SHOWN else ""
    return f"{kind}{'' if len(rows) == 1 else 's'} {shown}{more}"


def _outside(values: list[Any], column: str, names: tuple[str, ...]) -> Iterator[str]:
    known = set(names)
    outside: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        if value is not None and str(value) not in known:
            outside.setdefault(str(value), []).append(row)
    listed = ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")
    for value, at in list(outside.items())[:NUM_SHOWN]:
        yield (
            f"column {column!r} has the label {value!r} in {row_list(at)}, which is none of the "
            f"{len(names)} names of the training rows: {listed}"
        )


def _missing(value: int | None) -> bool:
    return value is None or value < 0


def _whole(value: Any) -> Any:
    """A CSV column of integers with gaps arrives as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
