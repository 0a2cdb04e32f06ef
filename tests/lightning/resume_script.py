"""`resume_run.run` as a script that kills itself, or is told to end; spawned workers import this file again."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    from tests.lightning.resume_run import run

    run(Path(sys.argv[1]), int(sys.argv[2]), (int(sys.argv[3]), int(sys.argv[4])), sys.argv[5])
