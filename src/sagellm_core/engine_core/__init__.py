"""The engine core: requests, scheduler, the step, and the thread that runs it."""
