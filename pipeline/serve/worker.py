"""Work of the networks in the background: one thread, and tasks that take turns."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from pipeline.inference.image_files import describe_failure

ADVICE = "open a smaller image"  # when memory runs out
PATIENCE = 10.0  # seconds after which a task that nobody asks for waits
IDLE = 0.5  # seconds between two looks whether a waiting task is asked for again


class Task:
    """Work in steps; between two of them, other tasks have their turn.

    Attributes:
        progress: how much is done, up to 1.
        is_done: whether it has ended well.
        error: why it has ended otherwise, in one line.
    """

    def __init__(self, work: Callable[["Task"], Iterator[None]]):
        """`work` sets `progress`; it is a generator whose parts are the steps."""
        self._steps = work(self)
        self._asked = time.monotonic()
        self.progress, self.is_done, self.error = 0.0, False, ""

    @property
    def is_running(self) -> bool:
        """Whether there is something left to do."""
        return not (self.is_done or self.error)

    def ask(self) -> dict:
        """Where it stands, {"state", "progress", "error"}; so it goes on, see `PATIENCE`."""
        self._asked = time.monotonic()
        state = "running" if self.is_running else "failed" if self.error else "done"
        return {"state": state, "progress": self.progress, "error": self.error}

    def cancel(self) -> None:
        """Has no further step done."""
        self.error = self.error or "canceled"

    @property
    def is_wanted(self) -> bool:
        """Whether somebody has asked for it lately: a page that was closed does not."""
        return time.monotonic() - self._asked < PATIENCE

    def step(self) -> None:
        """Does the next step."""
        try:
            next(self._steps)
        except StopIteration:
            self.progress, self.is_done = 1.0, True
        except ValueError as error:
            self.error = " ".join(str(error).split())
        except Exception as error:  # whatever it is, the other tasks must go on
            self.error = describe_failure(error, None, ADVICE)


class Worker:
    """The thread that runs the networks, so that no two of their passes compete."""

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="networks", daemon=True)
        self._thread.start()

    def add(self, work: Callable[[Task], Iterator[None]]) -> Task:
        """A new task, which takes its turns from now on."""
        task = Task(work)
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()
        return task

    def close(self) -> None:
        """Ends after the present step."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while task := self._next():
            task.step()

    def _next(self) -> Task | None:
        """The task whose turn it is, which becomes the last; None at the end."""
        with self._changed:
            while not self._is_closed:
                self._tasks = deque(task for task in self._tasks if task.is_running)
                for task in self._tasks:
                    if task.is_wanted:
                        self._tasks.remove(task)
                        self._tasks.append(task)
                        return task
                self._changed.wait(IDLE if self._tasks else None)
        return None
