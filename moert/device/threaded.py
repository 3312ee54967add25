"""A simulated device's work on threads, one a stream, with bytes that move and a link that takes its time."""

from __future__ import annotations

import threading
from time import perf_counter

from moert.device.work import Access, Done, Engine, Lane, Link, Work


class Threads(Engine):
    """Whatever may overlap on a device overlaps here: races are real ones."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._changed = threading.Condition()
        self._lanes: list[Lane] = []
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        self._stopped = threading.Event()
        self._waiting: dict[int, Work] = {}
        """Copies that wait for their link, by number."""

    def now(self) -> float:
        return perf_counter()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._stopped.wait(seconds)

    def add_lane(self, name: str, urgency: int) -> Lane:
        lane = Lane(name, urgency)
        self._lanes.append(lane)
        return lane

    def submit(self, work: Work) -> None:
        with self._changed:
            if not self._threads:
                self._start()
            work.lane.queue.append(work)
            self._changed.notify_all()

    def _start(self) -> None:
        for lane in self._lanes:
            thread = threading.Thread(target=self._serve, args=(lane,), name=f"moert-device-{lane.name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def is_done(self, done: Done) -> bool:
        return done.at_s is not None

    def wait(self, done: Done) -> None:
        with self._changed:
            self._changed.wait_for(lambda: done.at_s is not None or self.failure is not None)

    def drain(self) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure is not None or not any(lane.queue for lane in self._lanes),
            )

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.failure = self.failure or error
            self._stopped.set()
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._stopped.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self, lane: Lane) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or (lane.queue and lane.queue[0].may_begin))
                if self._is_over:
                    return
                work = lane.queue[0]
                if work.link is not None and not self._claim(work.link, work):
                    return
            try:
                self._do(work)
            except Exception as error:
                self.fail(error)
            finally:
                with self._changed:
                    if work.link is not None:
                        work.link.is_busy = False
                    self._changed.notify_all()
                del work  # what it keeps alive is its caller's to free

    @property
    def _is_over(self) -> bool:
        return self._is_closing or self.failure is not None

    def _claim(self, link: Link, work: Work) -> bool:
        """Wait for the link's turn; False if there will be none."""
        self._waiting[work.number] = work

        def is_next() -> bool:
            rivals = [other for other in self._waiting.values() if other.link is link]
            first = min(rivals, key=lambda other: (other.lane.urgency, other.number))
            return first is work and not link.is_busy

        self._changed.wait_for(lambda: self._is_over or is_next())
        del self._waiting[work.number]
        link.is_busy = not self._is_over
        return link.is_busy

    def _do(self, work: Work) -> None:
        with self._changed:
            self._access.begin(work)
        if work.prepare is not None:
            work.prepare()
        self.sleep(work.seconds)
        if self._is_over:
            return
        work.action()
        with self._changed:
            self._access.end(work)
            work.lane.queue.popleft()
            work.done.at_s = perf_counter()
            if work.link is not None:
                work.link.busy_s += work.seconds
                work.link.nbytes += work.nbytes
