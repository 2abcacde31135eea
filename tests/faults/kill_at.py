"""Dies by SIGKILL at the nth change to the disk: in the middle of it where n is odd, right after it where n is even.

For programs that fork one child a point: the helpers change the process they are called in.
"""

import json
import os
import signal
import sys
import traceback

# Everything that the durable path calls to change the disk.
OPERATIONS = ("mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir")


def install(nth):
    """Count the operations from now on and die at the nth (0: never); returns the list of those that were done."""
    done = []

    def counted(name, operation):
        def call(*arguments, **options):
            last = len(done) + 1 == nth
            if last and nth % 2:
                if name == "write":  # torn: half of it reaches the file
                    descriptor, data = arguments
                    operation(descriptor, memoryview(data)[: len(data) // 2])
                die()
            result = operation(*arguments, **options)
            if last:
                die()
            done.append(name)
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(name, getattr(os, name)))
    return done


def die():
    """Leave no chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)


def fork(function):
    """Run `function` in a child. Returns its exit status (minus the signal that killed it), and its JSON result."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        status = 1
        try:
            # The pipe's own write is not among the counted ones: those go by the name os.write.
            with open(writer, "w") as pipe:  # noqa: PTH123
                json.dump(function(), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with open(reader) as pipe:  # noqa: PTH123
        text = pipe.read()
    _, waited = os.waitpid(pid, 0)
    status = os.waitstatus_to_exitcode(waited)
    return status, json.loads(text) if status == 0 else None
