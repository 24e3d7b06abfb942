"""Durations as text."""


def format_duration(seconds: float) -> str:
    """Formats seconds in two units at most.

    >>> format_duration(0.00021), format_duration(0.0488), format_duration(1.234)
    ('0.2 ms', '48.8 ms', '1.23 s')
    >>> format_duration(200), format_duration(7380)
    ('3 min 20 s', '2 h 03 min')
    """
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.2f} s"
    minutes, remainder = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{remainder} s"
    if minutes < 60:
        return f"{minutes} min {remainder:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_clock(seconds: float) -> str:
    """Formats seconds as a clock does.

    >>> format_clock(62), format_clock(3723)
    ('1:02', '1:02:03')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
