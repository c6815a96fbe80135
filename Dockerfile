# One image, four commands: api, worker, relay, migrate. `make image` builds it.
#
# An image with tasks of your own starts from this one: COPY the modules to /app,
# or install them with `python -m pip --python /opt/taskqueue/bin/python install …`
# as root, and name them in TASKQUEUE_TASK_MODULES.
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/taskqueue
WORKDIR /src
# What changes seldom comes first. Wheels alone: a compiler is needed in no stage.
COPY requirements/image.txt requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip --python /opt/taskqueue/bin/python install --quiet --no-compile --only-binary :all: \
      --require-hashes -r requirements/image.txt
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY .ci/strip .ci/
# Setuptools has built the package, and nothing that runs needs it, nor others' tests, the sources of compiled
# modules and what only debuggers read in them. The bytecode is made here because the root file system is read-only
# later, and is not compared with its sources: their times may differ. There is none of what is large and not imported.
# Sets are written in the order of their hashes, so these have a seed, and two builds the same bytes.
RUN python -m pip --python /opt/taskqueue/bin/python install --quiet --no-compile --no-build-isolation --no-deps . \
 && python -m pip --python /opt/taskqueue/bin/python uninstall --quiet --yes setuptools \
 && find /opt/taskqueue/lib \( -path '*/sqlalchemy/testing/*' -o -path '*/alembic/testing/*' -o -path '*/greenlet/tests/*' \
      -o -name '*.pyi' -o -name '*.pyx' -o -name '*.px[di]' -o -name '*.[ch]' -o -name '*.[ch]pp' \) -type f -delete \
 && python .ci/strip /opt/taskqueue/lib \
 && /opt/taskqueue/bin/python -c 'import app.main, app.relay, uvloop' \
 && find /opt/taskqueue -name '*.pyc' -delete \
 && PYTHONHASHSEED=0 /opt/taskqueue/bin/python -m compileall -q --invalidation-mode unchecked-hash \
      -x '/sqlalchemy/dialects/(mssql|mysql|oracle)/|/table_grapheme_overrides' /opt/taskqueue/lib

FROM ${PYTHON_IMAGE}
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="taskqueue" \
      org.opencontainers.image.description="Run long work in the background for anyone who speaks HTTP, and lose none of it." \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Any user id will do: what is written goes below TASKQUEUE_DATA_DIR and /tmp, which are mounted.
# The account is written as it is: `useradd` would note the day in /etc/shadow, and each day's image be another.
RUN echo 'taskqueue:x:10001:' >>/etc/group \
 && echo 'taskqueue:x:10001:10001::/var/lib/taskqueue:/usr/sbin/nologin' >>/etc/passwd \
 && install -d -m 0777 /var/lib/taskqueue && install -d /app
COPY --from=build /opt/taskqueue /opt/taskqueue
ENV PATH=/opt/taskqueue/bin:$PATH \
    HOME=/var/lib/taskqueue \
    TASKQUEUE_REVISION=${REVISION} \
    HOST=0.0.0.0 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TASKQUEUE_DATA_DIR=/var/lib/taskqueue
WORKDIR /app
USER 10001:10001
EXPOSE 8000 9100
ENTRYPOINT ["taskqueue"]
CMD ["--help"]
