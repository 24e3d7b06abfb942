"""The hardware table as text: figures in units that people compare, and where each is from."""

from collections.abc import Sequence

from .._core.io._table import Column, Table, fold_text
from ._chips import GB, GIB, TERA, Chip

_WIDTH = 100


def hardware_table(chips: Sequence[Chip]) -> str:
    """Lays chips out as text of at most 100 columns: all figures, then the source of each.

    Rates are peaks of dense products, per JAX device; links are one way.
    """
    dtypes = list(dict.fromkeys(dtype for chip in chips for dtype in chip.flops))
    near = [*(f"{dtype}\nTFLOP/s" for dtype in dtypes), "memory\nGiB", "memory\nGB/s", "link\nGB/s"]
    columns = ["chip", *(Column(head, right=True) for head in near), "links join"]
    columns += [Column(head, right=True) for head in ("network\nGB/s", "hop\nµs")]
    rows = []
    for chip in chips:
        rates = [_short(chip.flops[d] / TERA) if d in chip.flops else "" for d in dtypes]
        sizes = [chip.memory / GIB, chip.memory_bandwidth / GB, chip.link / GB]
        far = [_short(chip.network / GB), _short(1e6 * chip.latency)]
        rows.append([chip.name, *rates, *map(_short, sizes), joined_by(chip), *far])
    lines = [Table(columns, rows, gap=1).to_text(_WIDTH)]
    for chip in chips:
        lines.append(f"\n{chip.name}")
        for source, figures in _by_source(chip).items():
            lines += fold_text(f"  {', '.join(figures)}: {source}", _WIDTH, "    ")
    return "\n".join(lines)


def joined_by(chip: Chip) -> str:
    """What the fast links are, in a few words."""
    if chip.torus_dims:
        return f"{chip.torus_dims}D torus"
    return "threads" if chip.domain is None else f"{chip.domain} GPUs"


def _by_source(chip: Chip) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for figure, source in chip.sources.items():
        found.setdefault(source, []).append(figure.replace("_", " "))
    return found


def _short(value: float) -> str:
    """Three digits, or all before the point.

    >>> _short(1228.0), _short(3.125), _short(83.6)
    ('1228', '3.12', '83.6')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
