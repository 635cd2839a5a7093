"""Numbers and names as a person reads them."""

import math
import unicodedata

NOTHING = "—"
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object, limit: int = 40) -> str:
    r"""Return `text` fit for a terminal, a figure or a page: one line, at most `limit` long, no control characters.

    Client names come from data, so they may hold escape sequences, line breaks or text-direction marks.
    What is too long is cut in the middle: names in groups ("play/speaker") differ at their ends.

    >>> printable("Romeo\n\x1b[31m and   Juliet")
    'Romeo �[31m and Juliet'
    >>> printable("The Tragedy of Hamlet, Prince of Denmark/KING CLAUDIUS", limit=24)
    'The Trag…k/KING CLAUDIUS'
    """
    whole = str(text)
    few = whole if len(whole) <= 20 * limit else f"{whole[: 10 * limit]} {whole[-10 * limit :]}"
    one_line = " ".join(few.split())
    safe = "".join("\ufffd" if unicodedata.category(letter) in _UNSAFE else letter for letter in one_line)
    if not safe:
        return "(no name)"
    return safe if len(safe) <= limit else f"{safe[: limit // 3]}…{safe[limit // 3 + 1 - limit :]}"


def number(value: float | None) -> str:
    """Return `value` with three significant digits, thousands set off; a dash where there is none.

    >>> [number(value) for value in (29.134, 0.01234, 46644.2, 128, 0, None)]
    ['29.1', '0.0123', '46,644', '128', '0', '—']
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) >= 1e9:
        return f"{value:.2e}"
    rounded = abs(float(f"{value:.3g}"))
    if rounded >= 100 or value == 0:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(rounded))
    return f"{value:.{digits}f}" if digits <= 6 else f"{value:.2e}"


def count(value: float | None) -> str:
    """Return a whole number, thousands set off.

    >>> [count(value) for value in (57.0, 81920, None)]
    ['57', '81,920', '—']
    """
    return NOTHING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """Return a share of 1 in percent.

    >>> [percent(share) for share in (0.614, 1.0, None)]
    ['61 %', '100 %', '—']
    """
    return NOTHING if share is None or not math.isfinite(share) else f"{100 * share:.0f} %"


def size(amount: float | None) -> str:
    """Return an amount of bytes in binary units.

    >>> [size(amount) for amount in (512, 1536, 12_900_000, None)]
    ['512 B', '1.50 KiB', '12.3 MiB', '—']
    """
    if amount is None or not math.isfinite(amount):
        return NOTHING
    value = float(amount)
    if abs(value) < 1024:
        return f"{value:.0f} B"
    value /= 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{number(value)} {unit}"
        value /= 1024
    return f"{number(value)} TiB"


def duration(seconds: float | None) -> str:
    """Return a time span.

    >>> [duration(seconds) for seconds in (0.0421, 12.34, 65, 3725, None)]
    ['0.0421 s', '12.3 s', '1 min 05 s', '1 h 02 min', '—']
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 59.95:
        return f"{number(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def change(value: float, reference: float) -> str:
    """Say how far `value` lies from `reference`, as a share of it.

    >>> change(29.1, 46.6), change(30.9, 30.0), change(2.0, 2.0)
    ('38 % below', '3.0 % above', 'equal to')
    """
    share = 100 * (value / reference - 1) if reference else math.nan
    if not math.isfinite(share):
        return "not to be compared with"
    if abs(share) < 0.05:
        return "equal to"
    amount = f"{abs(share):.0f}" if abs(share) >= 9.95 else f"{abs(share):.1f}"
    return f"{amount} % {'below' if share < 0 else 'above'}"
