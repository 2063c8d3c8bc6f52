# An image with everything a run needs; `--build-arg DEVICE=gpu` takes the GPU builds of torch and vLLM.
FROM python:3.11-slim

ARG DEVICE=cpu

# DeepSpeed compiles a helper when it first starts; vLLM's CPU build binds threads to memory nodes; KubeRay asks a
# node for its health by wget.
RUN apt-get update \
    && apt-get install --no-install-recommends --yes build-essential git libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv

WORKDIR /opt/r2m-ray

# Dependencies change less often than the code, so they are a layer of their own. The constraints pin the CPU
# builds; GPU builds follow the ranges of pyproject.toml. Bytecode is made here, because no run may write it:
# without it every process of every run compiles all that it imports.
COPY pyproject.toml constraints.txt ./
RUN if [ "$DEVICE" = gpu ]; \
    then uv pip install --system --no-cache --compile-bytecode --requirements pyproject.toml --extra gpu --extra sweep; \
    else uv pip install --system --no-cache --compile-bytecode --requirements pyproject.toml --extra cpu --extra sweep \
           --torch-backend=cpu --constraint constraints.txt; \
    fi

COPY README.md LICENSE ./
COPY conf conf
COPY r2m_ray r2m_ray
RUN uv pip install --system --no-cache --compile-bytecode --no-deps .

# Runs, prepared models and caches are written below the working directory, which is meant to be a volume.
RUN useradd --create-home --uid 1000 r2m && mkdir /work && chown r2m /work
USER r2m
WORKDIR /work

ENTRYPOINT ["r2m-ray"]
CMD ["--help"]
