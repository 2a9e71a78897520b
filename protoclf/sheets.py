"""What a scoring sheet says in fewer rows: totals of classes, and what separates two of them."""

from __future__ import annotations

import pandas as pd

from protoclf.explanation import REST, UNREADABLE
from protoclf.fitted import check_columns
from protoclf.images import names_column

_MATCH = ["prototype_class", "similarity"]
_ABOUT = ["sample", "path", "class", "prototype", "prototype_class", "contribution"]
_TOTALLED = [*_ABOUT, "is_predicted", "logit", "probability"]
_COMPARED = [*_ABOUT, "similarity", "weight", "source"]
SHEET = "a scoring sheet, as from clf.explain(X)"


def class_totals(sheet: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each sample and class of a sheet: what its contributions sum to.

    Parameters
    ----------
    sheet : DataFrame
        From `ProtoPNetClassifier.explain`.

    Returns
    -------
    DataFrame
        Samples as in the sheet, each with its likeliest class first:

        - sample, path, class, is_predicted, logit, probability : as in the sheet
        - total : sum of the contributions, which is the logit but for rounding
        - own, others : sums of the contributions of the class's own prototypes and of those of
          other classes; of a truncated sheet without its "(rest)"
        - n_prototypes : rows that name a prototype

        A class without any weight has no rows in a sheet and none here: its logit is 0.

    Raises
    ------
    ValueError
        If the sheet lacks columns.
    """
    check_columns("sheet", sheet, _TOTALLED, SHEET)
    named = sheet["prototype"].notna()
    own = named & (sheet["prototype_class"] == sheet["class"])
    parts = sheet.assign(
        own=sheet["contribution"].where(own, 0.0),
        others=sheet["contribution"].where(named & ~own, 0.0),
        named=named,
    )
    groups = parts.groupby(["sample", "class"], sort=False)
    about = groups[["path", "is_predicted", "logit", "probability"]].first()
    sums = groups.agg(
        total=("contribution", "sum"),
        own=("own", "sum"),
        others=("others", "sum"),
        n_prototypes=("named", "sum"),
    )
    table = about.join(sums).reset_index()
    return table[["sample", "path", "class", *about.columns[1:], *sums.columns]]


def compare(sheet: pd.DataFrame) -> pd.DataFrame:
    """Return what separates two classes, by prototype; images without an answer are left out.

    Parameters
    ----------
    sheet : DataFrame
        From ``clf.explain(X, classes="top2")``, or with two labels as `classes`; whole, that is
        with ``top=None``.

    Returns
    -------
    DataFrame
        One row for each sample and prototype that speaks for or against one of the two, what
        separates them most first:

        - sample, path : the image
        - class, rival : the class of the higher logit, and the other
        - prototype, prototype_class, similarity : as in the sheet
        - weight, rival_weight, contribution, rival_contribution : in either class
        - difference : contribution - rival_contribution; of a sample they sum to the difference
          of the two logits

    Raises
    ------
    ValueError
        If a sample does not have exactly two classes, or the sheet is truncated or lacks columns.
    """
    check_columns("sheet", sheet, _COMPARED, SHEET)
    sheet = sheet[sheet["source"] != UNREADABLE]
    if (sheet["source"] == REST).any():
        raise ValueError('compare needs whole sheets: explain(X, classes="top2", top=None).')
    tables = [_compared(rows) for _, rows in sheet.groupby("sample", sort=False)]
    if not tables:
        raise ValueError("compare needs a sheet with rows.")
    return pd.concat(tables, ignore_index=True)


def _compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Compare the classes of one sample, the likelier of which comes first in its sheet."""
    sides = [side.set_index("prototype") for _, side in rows.groupby("class", sort=False)]
    first = rows.iloc[0]
    if len(sides) != 2:
        raise ValueError(
            'compare needs two classes for each sample: explain(X, classes="top2"), or two '
            f"labels; sample {first['sample']} has {len(sides)}. A class without weights has no "
            "rows: its logit is 0."
        )
    winner, rival = sides
    match = pd.concat([winner[_MATCH], rival[_MATCH]])
    table = match[~match.index.duplicated()].reset_index()
    for prefix, side in (("", winner), ("rival_", rival)):
        for name in ("weight", "contribution"):
            table[prefix + name] = side[name].reindex(table["prototype"]).fillna(0.0).to_numpy()
    table["difference"] = table["contribution"] - table["rival_contribution"]
    table = table.sort_values("difference", key=lambda d: -d.abs(), kind="stable")
    names = {"class": winner["class"].iloc[0], "rival": rival["class"].iloc[0]}
    about = pd.DataFrame({"sample": first["sample"], **names}, table.index)
    about.insert(1, "path", names_column([first["path"]] * len(table)).set_axis(table.index))
    columns = ["prototype", *_MATCH, "weight", "rival_weight"]
    columns += ["contribution", "rival_contribution", "difference"]
    return pd.concat([about, table[columns]], axis=1)
