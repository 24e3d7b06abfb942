"""The hardware table as text, in the usual units, with the source of each figure."""

from collections.abc import Sequence

from .._core.io._table import Column, Table, fold_text, text_width
from ._chips import GB, GIB, TERA, Chip


def hardware_table(chips: Sequence[Chip]) -> str:
    """Formats chips as text of at most 100 columns: all figures, then the source of each.

    Rates are peaks of dense products, per JAX device; links are one way.
    """
    dtypes = list(dict.fromkeys(dtype for chip in chips for dtype in chip.flops))
    heads = [
        *(f"{dtype}\nTFLOP/s" for dtype in dtypes),
        "memory\nGiB",
        "memory\nGB/s",
        "link\nGB/s",
    ]
    columns = ["chip", *(Column(head, right=True) for head in heads), "links join"]
    columns += [Column(head, right=True) for head in ("network\nGB/s", "hop\nµs")]
    rows = []
    for chip in chips:
        rates = [_format_number(chip.flops[d] / TERA) if d in chip.flops else "" for d in dtypes]
        sizes = [chip.memory / GIB, chip.memory_bandwidth / GB, chip.link / GB]
        far = [_format_number(chip.network / GB), _format_number(1e6 * chip.latency)]
        rows.append([chip.name, *rates, *map(_format_number, sizes), describe_links(chip), *far])
    lines = [Table(columns, rows, gap=1).to_text(text_width())]
    for chip in chips:
        lines.append(f"\n{chip.name}")
        for source, figures in _group_by_source(chip).items():
            lines += fold_text(f"  {', '.join(figures)}: {source}", text_width(), "    ")
    return "\n".join(lines)


def describe_links(chip: Chip) -> str:
    """Returns `3D torus`, `8 GPUs` or `threads`: what the fast links join."""
    if chip.torus_dims:
        return f"{chip.torus_dims}D torus"
    return "threads" if chip.domain is None else f"{chip.domain} GPUs"


def _group_by_source(chip: Chip) -> dict[str, list[str]]:
    figures: dict[str, list[str]] = {}
    for figure, source in chip.sources.items():
        figures.setdefault(source, []).append(figure.replace("_", " "))
    return figures


def _format_number(value: float) -> str:
    """Returns three significant digits, or all those before the point.

    >>> _format_number(1228.0), _format_number(3.125), _format_number(83.6)
    ('1228', '3.12', '83.6')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
