"""What tests of streaming share: a run that is interrupted at a chosen unit of its work."""


class Stop:
    """Progress that notes the units of the work, and stops it at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seen = at, []

    def __call__(self, done, total, what):
        self.seen.append(done)
        if done == self.at:
            raise KeyboardInterrupt
