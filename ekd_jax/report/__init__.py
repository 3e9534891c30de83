"""A run directory as tables for a terminal and one HTML page for people.

Nothing here knows a training method. A run is what its directory says: the
members and figures of `summary.json`, the keys of `metrics.jsonl`. So a new
method gets its report for free, and what was not measured is not shown.

    write(run_dir)          RUN_DIR/report.html, self-contained
    members_table(summary)  the table at the end of a run
    compare_table(run_dirs) the same members in several runs
    unlike(run_dirs)        what makes that comparison unfair

`findings` turns figures into sentences that stay true when a run is
unfinished or its result is bad; `curves` turns metric lines into curves;
`figures` draws them; `style` is how it all looks.
"""

from ekd_jax.report.page import write
from ekd_jax.report.tables import (
  compare_table,
  compare_text,
  members_table,
  members_text,
  unlike,
)

__all__ = [
  "compare_table",
  "compare_text",
  "members_table",
  "members_text",
  "unlike",
  "write",
]
