#!/usr/bin/env bash
# Sets up what `make` needs: .venv from the pinned lock of this machine (CUDA or CPU), guilomo
# itself in it, and the small model in .cache/. Does only what is missing; what was interrupted
# is done again.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
model=.cache/smollm2-135m-instruct

say() { printf '[set-up] %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }

# Prints pip's messages as a short count of packages; says all of them if pip fails.
install() {
    local total=$1 log=$venv/pip.log count=0
    shift
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/pip" install --no-compile --no-input "$@" 2>&1 |
        tee "$log" |
        while IFS= read -r line; do
            case $line in
                Collecting\ * | Processing\ *)
                    count=$((count + 1))
                    if ((count % 20 == 0)); then say "  $count of about $total packages fetched"; fi
                    ;;
                Installing\ collected*) say "  unpacking" ;;
            esac
        done || { tail -n 30 "$log" >&2; fail "pip failed; the whole log is $log"; }
}

if [[ $(uname -sm) != "Linux x86_64" ]]; then
    fail "the locks are for Linux on x86_64, this is $(uname -sm)"
fi
if nvidia-smi -L 2>/dev/null | grep -q GPU; then device=cuda; else device=cpu; fi
lock=deploy/$device.lock
lock_hash=$(sha256sum <"$lock")
project_hash=$(sha256sum <pyproject.toml)

mkdir -p .cache
exec 9>.cache/setup.flock
flock 9 # two makes at once: the second waits, then finds all done

if [[ $(cat $venv/lock.stamp 2>/dev/null) != "$lock_hash" ]]; then
    python=$(command -v python3.11 || command -v python3 || true)
    [[ -n $python ]] || fail "no python3.11 on this machine: install Python 3.11"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
        fail "$python is $("$python" --version), guilomo's locks need Python 3.11, 3.12 or 3.13"
    # vLLM's CPU library is linked with libnuma, which no package brings.
    [[ $device == cuda ]] || "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        fail "libnuma.so.1 is missing, which vLLM on CPU needs (on Debian the package libnuma1)"
    say "1/4 new environment $venv for $device with $("$python" --version)"
    rm -rf $venv
    "$python" -m venv $venv ||
        fail "$python has no venv module: install it (on Debian the package python3-venv)"

    total=$(grep -c == "$lock")
    say "2/4 installing $total packages of $lock: some minutes, and gigabytes for CUDA"
    # The lock has no dependency left to resolve, but for what torch needs on CPU: its build
    # differs with the package index (CPU alone, or with CUDA's libraries), the version does not.
    if [[ $device == cpu ]]; then
        install 10 --only-binary :all: -c "$lock" "$(grep '^torch==' "$lock")"
    fi
    install "$total" --only-binary :all: --no-deps -r "$lock"
    # All cores do it at once, and where Python may not write bytecode each start would cost it.
    say "  compiling to bytecode"
    "$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python3*/site-packages >"$venv/compile.log" ||
        true # some packages carry templates and sources for other Pythons
    echo "$lock_hash" >$venv/lock.stamp
fi

if [[ $(cat $venv/project.stamp 2>/dev/null) != "$project_hash" ]]; then
    say "3/4 installing guilomo itself"
    install 1 --no-deps --no-build-isolation --editable .
    echo "$project_hash" >$venv/project.stamp
fi

if [[ ! -d $model ]]; then
    say "4/4 preparing the model $model: about half a minute"
    $venv/bin/python deploy/prepare_model.py $model 2>$venv/model.log ||
        { cat $venv/model.log >&2; fail "the model could not be prepared"; }
fi
