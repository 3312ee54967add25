"""A simulated device's work in virtual time: no thread, no sleep, and the same order every time."""

from __future__ import annotations

from moert.device.work import Access, Done, Engine, Lane, Work


class VirtualTime(Engine):
    """Time passes where somebody waits, or says so by `sleep`; work whose time has come is done when somebody asks.

    Beginnings and endings happen in the order of their times, an ending before a beginning of the same time, and of two
    copies for one link the more urgent one first. So overlap is real: between the beginning and the end of a copy other
    work begins and ends, and what it finds is a slot that is being filled.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lanes: list[Lane] = []
        self._now_s = 0.0

    def now(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        self._now_s += seconds
        self._advance(self._now_s)

    def add_lane(self, name: str, urgency: int) -> Lane:
        self._lanes.append(Lane(name, urgency))
        return self._lanes[-1]

    def submit(self, work: Work) -> None:
        work.submitted_s = self._now_s
        work.lane.queue.append(work)

    def is_done(self, done: Done) -> bool:
        self._advance(self._now_s)
        return done.at_s is not None and done.at_s <= self._now_s

    def wait(self, done: Done) -> None:
        while done.at_s is None and self.failure is None:
            # Whoever waits for what nobody will do would wait for ever on a device.
            assert self._advance_once(None), "waits for work that waits for itself, or for none"
        if done.at_s is not None:
            self._now_s = max(self._now_s, done.at_s)

    def drain(self) -> None:
        for lane in self._lanes:
            while lane.queue and self.failure is None:
                self.wait(lane.queue[-1].done)

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        for lane in self._lanes:
            lane.queue.clear()

    def close(self) -> None:
        self.fail(RuntimeError("the device is closed"))

    def _advance(self, until_s: float) -> None:
        while self.failure is None and self._advance_once(until_s):
            pass

    def _advance_once(self, until_s: float | None) -> bool:
        """Let the next thing happen that happens until then; False if nothing does."""
        heads = [lane.queue[0] for lane in self._lanes if lane.queue]
        coming = [(work.end_s, 0, 0, work.number, work) for work in heads if work.end_s is not None]
        coming += [
            (self._begin_s(work), 1, work.lane.urgency, work.number, work)
            for work in heads
            if work.end_s is None and work.may_begin and not (work.link is not None and work.link.is_busy)
        ]
        if not coming:
            return False
        at_s, is_beginning, _, _, work = min(coming, key=lambda one: one[:4])
        if until_s is not None and at_s > until_s:
            return False
        try:
            if is_beginning:
                self._begin(work, at_s)
            else:
                self._end(work, at_s)
        except Exception as error:
            self.fail(error)
        return True

    @staticmethod
    def _begin_s(work: Work) -> float:
        times = [work.submitted_s, work.lane.free_at_s, *(before.at_s or 0.0 for before in work.after)]
        return max([*times, work.link.free_at_s] if work.link is not None else times)

    def _begin(self, work: Work, at_s: float) -> None:
        self._access.begin(work)
        if work.prepare is not None:
            work.prepare()
        work.end_s = at_s + work.seconds
        if work.link is not None:
            work.link.is_busy = True

    def _end(self, work: Work, at_s: float) -> None:
        work.action()
        self._access.end(work)
        work.lane.queue.popleft()
        work.lane.free_at_s = work.done.at_s = at_s
        if work.link is not None:
            work.link.is_busy, work.link.free_at_s = False, at_s
            work.link.busy_s += work.seconds
            work.link.nbytes += work.nbytes
