"""`visionq demo`: the local stack, three drawn scenes' worth of jobs at once, and the answers next to the truth.

Everything is real but the world: the pictures are drawn, so that it is known what is true about them. Knows the client
and the stack; the pictures come from a child process.
"""

from api_stub.demo.run import DemoFailed, run_demo

__all__ = ["DemoFailed", "run_demo"]
