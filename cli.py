"""Entry point of a checkout; the program itself is ``dpr_lightning.main``."""

from dpr_lightning.main import main

if __name__ == "__main__":
    main()
