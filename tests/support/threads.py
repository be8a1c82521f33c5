"""Jobs that run in threads at the same time."""

import threading
from collections.abc import Callable, Iterable

PATIENCE_SECONDS = 120  # Only a deadlock takes so long.


def run_together(jobs: Iterable[Callable[[], object]]) -> list:
    """Runs each job in its own thread, and returns the results in order."""
    jobs = list(jobs)
    results, failures, barrier = [None] * len(jobs), [], threading.Barrier(len(jobs))

    def work(i):
        try:
            barrier.wait(PATIENCE_SECONDS)
            results[i] = jobs[i]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    if failures:
        raise failures[0]
    return results
