# Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.
"""What bench/report and bench/compare have in common: reading a run and naming its rows."""

import json

PARAMETERS = ("payload_bytes", "window", "gap_us", "connections", "calls_each")

# What issue and README ask of each key of "ratios": at least, and the aim. Two idle cores, against
# Cap'n Proto 0.9.2.
TARGETS = {
    "small_p50_spin": (12, 16),
    "small_p99_spin": (8, 12),
    "small_p50_nospin": (0.6, 1.0),
    "small_p50_default": (8, 14),
    "small_cpu_default": (1.5, 4),
    "small_cpu_nospin": (1.0, 1.5),
    "small_p50_plain_ctor": (8, 12),
    "window256_copy": (4, 5),
    "param16k_copy_spin": (10, 14),
    "param64k_copy_spin": (8, 12),
    "param1m_copy_rw": (2, 3),
    "param1m_inplace": (15, 25),
    "param16m_inplace": (7, 20),
    "stream_copy": (4, 8),
    "one_core": (1.0, 1.2),
    "loaded": (1.0, 1.2),
}
# Since 1.0 TwoPartyVatNetwork batches what it writes and reads ahead.
TARGETS_SINCE_1_0 = {"small_p50_spin": (8, None), "window256_copy": (2.5, None)}


def read(path):
    with open(path) as file:
        return json.load(file)


def size(number):
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= unit and number % unit == 0:
            return f"{number // unit} {name}"
    return f"{number} B"


def describe(row):
    """The parameters of a row, for people."""
    parts = []
    if "payload_bytes" in row:
        parts.append(size(int(row["payload_bytes"])))
    if "window" in row:
        parts.append(f"{row['window']:g} in flight")
    if "gap_us" in row:
        parts.append(f"gap {row['gap_us']:g} µs")
    if "connections" in row:
        count = row["connections"]
        parts.append(f"{count:g} connection" + ("s" if count > 1 else ""))
    if "calls_each" in row:
        parts.append(f"{row['calls_each']:g} calls each")
    return ", ".join(parts)


def key(row):
    """What identifies a row."""
    return (row["case"],) + tuple(row.get(name) for name in PARAMETERS) + (row["transport"],)


def number(value, digits=3):
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) >= 10 ** digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def table(head, rows):
    """A table that is readable as it is, and as Markdown."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head] + rows) for i in range(len(head))]
    texts = [all(not row[i][:1].isdigit() for row in rows) for i in range(len(head))]

    def line(row):
        cells = [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, texts)
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, texts)]
    return "\n".join([line(head), "| " + " | ".join(rule) + " |"] + [line(row) for row in rows])
