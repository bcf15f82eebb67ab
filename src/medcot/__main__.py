"""``python -m medcot``: the same command line as ``medcot``, for where no script is on the path."""

from medcot.cli import main

if __name__ == "__main__":
    main()
