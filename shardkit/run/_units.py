"""Times as people read them."""


def duration(seconds: float) -> str:
    """Returns a time in two units at most.

    >>> duration(0.00021), duration(0.0488), duration(1.234), duration(200), duration(7380)
    ('0.2 ms', '48.8 ms', '1.23 s', '3 min 20 s', '2 h 03 min')
    """
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def remaining(seconds: float) -> str:
    """Returns a time as a clock shows it.

    >>> remaining(62), remaining(3723)
    ('1:02', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
