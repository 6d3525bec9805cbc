# docker build -t tokenformer . && docker run --gpus all --ipc host --volume "$PWD/runs:/home/trainer/megatron_tokenformer/runs" tokenformer
#
# `make demo`, which is run by default, and `make test` work inside.  A folder that is bound over `runs` must be
# writable for uid 1001.  docs/cluster.md tells how Apptainer runs the image.
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04

# Triton compiles with gcc against Python.h when kernels are first used; pdsh and ssh are deepspeed's way to hosts.
# Versions of packages are those of the release that the base names; distributions drop older ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
       ca-certificates gcc git hostname libc6-dev make openssh-client pdsh procps python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# WORKDIR would make the folder root's.
RUN useradd --create-home --uid 1001 trainer \
    && install --directory --owner trainer --group trainer /home/trainer/megatron_tokenformer
USER 1001
WORKDIR /home/trainer/megatron_tokenformer

# The environment first: it changes less often than the code.
COPY --chown=trainer:trainer pyproject.toml requirements.txt requirements-dev.txt Makefile README.md ./
COPY --chown=trainer:trainer megatron_tokenformer/__init__.py megatron_tokenformer/
RUN make install-dev
COPY --chown=trainer:trainer . .
ENV PATH=/home/trainer/megatron_tokenformer/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1
CMD ["make", "demo"]
