"""`python -m taid_ray.cli`, the same as `taid-ray`."""

from taid_ray.cli.app import main

if __name__ == "__main__":
    main()
