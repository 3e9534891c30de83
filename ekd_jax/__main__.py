"""`python -m ekd_jax report|evaluate|compare`: works on finished runs."""

from ekd_jax.cli import tools

if __name__ == "__main__":
  tools()
