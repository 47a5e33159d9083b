"""`python -m strata`: the command line of whichever strata this interpreter finds first."""

from strata.cli.main import main

if __name__ == "__main__":
    main()
