#!/usr/bin/env bash
# What the Makefile's targets do: install what is missing, build, check, test. See `make help`.
#
# Environment:
#   PYTHON   interpreter for .venv (default python3)
#   JOBS     parallel build jobs (default: the number of cores)
#   ONLY     stages of `test` to run, e.g. ONLY="mypy pytest"
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
ROOT=$PWD
COMMAND=${1:-help}
shift || true
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-$(nproc)}
ONLY=${ONLY:-}
VENV=$ROOT/.venv
NEWEST=3.12 # the newest supported Python; `make test` tries it besides the default one
NEWEST_VENV=$ROOT/.venv-newest
BUILD_REQUIREMENTS=("scikit-build-core>=0.11" "nanobind>=2.4" "jaxlib>=0.10" cmake ninja)

export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH

# ---- output --------------------------------------------------------------------------------------------

started=$SECONDS
passed=()
failed=()
skipped=()
bold='' plain=''
if [[ -t 1 ]]; then bold=$'\e[1m' plain=$'\e[0m'; fi

say() { printf '%s\n' "$*"; }
die() {
  printf '%s\n' "$*" >&2
  exit 1
}
duration() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }
joined() {
  local text
  printf -v text '%s, ' "$@"
  printf '%s' "${text%, }"
}

# stage NAME COMMAND...: runs the command in a subshell with `set -e`, times it, notes how it ended in $status.
# A command that exits 77 has skipped itself and has written why to $skip_reason. Never call it in a condition
# (`stage ... || ...`): bash would ignore the `set -e`.
status=0
skip_reason=$(mktemp)
logs=$(mktemp -d)
stage() {
  local name=$1 begin=$SECONDS
  shift
  if [[ -n $ONLY && " $ONLY setup " != *" $name "* ]]; then return 0; fi
  say "${bold}==> $name${plain}"
  if [[ -t 1 ]]; then
    (
      set -e
      "$@"
    )
    status=$?
  else # where nobody watches, what a failed stage printed last is said again at the end
    local out tee
    exec {out}> >(tee "$logs/$name")
    tee=$!
    (
      set -e
      "$@"
    ) >&"$out" 2>&1
    status=$?
    exec {out}>&-
    # Not for ever: something that the stage left behind may hold the pipe.
    for _ in {1..30}; do kill -0 "$tee" 2>/dev/null && sleep 0.1; done
  fi
  if ((status == 0)); then
    passed+=("$name")
    say "${bold}<== $name: passed in $(duration $((SECONDS - begin)))${plain}"
  elif ((status == 77)); then
    skipped+=("$name")
    say "${bold}<== $name: skipped: $(<"$skip_reason")${plain}"
  else
    failed+=("$name")
    say "${bold}<== $name: FAILED (status $status) after $(duration $((SECONDS - begin)))${plain}"
  fi
}
skip() {
  printf '%s' "$*" >"$skip_reason"
  exit 77
}

finish() {
  local status=$? notes=''
  trap - EXIT
  local name
  for name in "${failed[@]}"; do
    [[ -f $logs/$name ]] || continue
    say "${bold}==> $name ended with${plain}"
    tail -n 25 "$logs/$name"
  done
  rm -rf "$skip_reason" "$logs"
  ((${#skipped[@]})) && notes="; skipped: $(joined "${skipped[@]}")"
  if ((${#failed[@]})); then
    say "make $COMMAND: FAILED ($(joined "${failed[@]}")$notes; $(duration $((SECONDS - started))))"
    exit 1
  elif ((status != 0)); then
    say "make $COMMAND: FAILED (status $status; $(duration $((SECONDS - started))))"
    exit "$status"
  fi
  say "make $COMMAND: PASSED (${#passed[@]} stages$notes; $(duration $((SECONDS - started))))"
  exit 0
}

# ---- setup ---------------------------------------------------------------------------------------------

check_python() {
  command -v "$PYTHON" >/dev/null || die "$PYTHON is missing: install Python 3.11 or newer (apt-get install python3), or set PYTHON"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$PYTHON is $("$PYTHON" -V 2>&1); 3.11 or newer is needed: set PYTHON to one"
}

apt_packages() { # of a section of requirements/apt.txt
  awk -v wanted="$1" '/^# section:/ {section = $3} !/^#/ && NF && section == wanted' requirements/apt.txt
}

# install_apt SECTION...: what is missing of these sections.
install_apt() {
  local sections=("$@") missing=() package section
  "$PYTHON" -c 'import ensurepip, sysconfig, os, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' 2>/dev/null ||
    sections+=(python)
  if ! command -v dpkg-query >/dev/null; then
    say "not a Debian or Ubuntu: make sure that the counterparts of requirements/apt.txt are installed"
    return 0
  fi
  for section in "${sections[@]}"; do
    for package in $(apt_packages "$section"); do
      [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
  done
  ((${#missing[@]})) || return 0
  say "installing with apt: ${missing[*]}"
  local as_root=()
  if ((EUID != 0)); then
    if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 ]]; }; then
      as_root=(sudo)
    else
      die "these packages are missing and neither root nor sudo is at hand; have them installed: apt-get install ${missing[*]}"
    fi
  fi
  local log=$ROOT/build/apt.log
  mkdir -p build
  { "${as_root[@]}" apt-get update &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
    >"$log" 2>&1 || { tail -n 20 "$log" >&2; die "apt-get failed; its output is in $log"; }
}

# make_venv DIR PYTHON: anew if the Python behind it has changed.
make_venv() {
  local version
  version=$("$2" -c 'import sys; print(*sys.version_info[:3], sys.base_prefix)')
  if [[ ! -x $1/bin/python || $(cat "$1/.python" 2>/dev/null) != "$version" ]]; then
    say "creating ${1#"$ROOT"/} ($("$2" -V))"
    "$2" -m venv --clear "$1"
    "$1/bin/python" -m pip install -qq --upgrade "pip>=24"
    printf '%s\n' "$version" >"$1/.python"
  fi
}

# once STAMP KEY COMMAND...: runs the command unless it has succeeded for this key.
once() {
  local stamp=$1 key=$2
  shift 2
  [[ $(cat "$stamp" 2>/dev/null) == "$key" ]] && return 0
  rm -f "$stamp"
  "$@"
  printf '%s\n' "$key" >"$stamp"
}

sources() { find proxy xla_ffi -name tests -prune -o \( -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name CMakeLists.txt \) -print | LC_ALL=C sort; }
modules() { find pplx_jax/ models/ -name '*.py*' -not -path '*/__pycache__/*' | LC_ALL=C sort; }
digest() { cat -- "$@" | sha256sum | cut -d' ' -f1; }
# shellcheck disable=SC2046
requirements_key() { printf "%s %s %s" "$1" "${BUILD_REQUIREMENTS[*]}" "$(digest pyproject.toml)"; }
# shellcheck disable=SC2046
extension_key() { printf '%s %s' "$(digest pyproject.toml CMakeLists.txt $(sources))" "$(modules | sha256sum | cut -d' ' -f1)"; }

install_requirements() { # VENV EXTRA
  say "installing the requirements into ${1#"$ROOT"/}"
  "$1/bin/python" -m pip install -qq "${BUILD_REQUIREMENTS[@]}"
  # The dependencies alone, so that a change in the C++ sources never reinstalls them.
  "$1/bin/python" - "$2" >"$1/requirements.txt" <<'PY'
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]

def expand(names):
    for name in names:
        match = re.fullmatch(r"pplx-jax\[(\w+)\]", name)
        if match:
            yield from expand(project["optional-dependencies"][match[1]])
        else:
            yield name

print(*project["dependencies"], *expand(project["optional-dependencies"][sys.argv[1]]), sep="\n")
PY
  "$1/bin/python" -m pip install -qq -r "$1/requirements.txt"
}

install_editable() {
  say "building the extension"
  "$VENV/bin/python" -m pip install -qq --no-build-isolation --no-deps -e . -C cmake.define.PPLX_WERROR=ON \
    -C "build.tool-args=-j$JOBS"
}

activate() {
  export VIRTUAL_ENV=$1
  export PATH=$1/bin:$PATH
}

# setup EXTRA APT-SECTION...
# Some sources are compiled alike in several build folders.
use_ccache() {
  command -v ccache >/dev/null || return 0
  export CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache CMAKE_CUDA_COMPILER_LAUNCHER=ccache
  export CCACHE_DIR=$ROOT/build/ccache CCACHE_BASEDIR=$ROOT CCACHE_NOHASHDIR=1
}

setup() {
  local extra=$1
  shift
  check_python
  install_apt "$@"
  use_ccache
  make_venv "$VENV" "$PYTHON"
  activate "$VENV"
  once "$VENV/.requirements-$extra" "$(requirements_key "$extra")" install_requirements "$VENV" "$extra"
  # shellcheck disable=SC2119
  once "$VENV/.extension" "$(extension_key)" install_editable
}

# ---- checks --------------------------------------------------------------------------------------------

ours() { find proxy xla_ffi benchmarks tests \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) | LC_ALL=C sort; }

check_ruff() {
  ruff check .
  ruff format --check .
}
check_mypy() { mypy; }
check_clang_format() { ours | xargs clang-format --dry-run -Werror && say "$(ours | wc -l) files are well formatted"; }

check_clang_tidy() {
  command -v clang-tidy >/dev/null || skip "clang-tidy is not installed"
  cmake --preset release -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >/dev/null
  # Two compilation databases: the C++ build's and, for the Python extension, the editable install's.
  "$VENV/bin/python" - <<'PY' >build/tidy.txt
import glob, json, os

chosen = {}
for folder in ["build/release", *sorted(glob.glob("build/cp3*"))]:
    path = os.path.join(folder, "compile_commands.json")
    if os.path.exists(path):
        for entry in json.load(open(path)):
            file = os.path.relpath(os.path.join(entry["directory"], entry["file"]))
            # Not the tests: GoogleTest's headers take most of the time, and they fail by themselves. Not the
            # kernels: nvcc's options and newest headers are foreign to clang.
            ours = file.startswith(("proxy/", "xla_ffi/", "benchmarks/")) and "/tests/" not in file
            if ours and file.endswith(".cc") and os.path.exists(file):
                chosen.setdefault(file, folder)
# The largest first, so that no core idles at the end.
for file, folder in sorted(chosen.items(), key=lambda item: -os.path.getsize(item[0])):
    print(folder, file)
PY
  say "$(wc -l <build/tidy.txt) files"
  # clang knows no GCC-only warning options.
  xargs -a build/tidy.txt -P "$JOBS" -n 2 sh -c \
    'clang-tidy --quiet -p "$0" --extra-arg=-Wno-unknown-warning-option "$1" 2>/dev/null || { echo "clang-tidy: $1 failed"; exit 1; }'
}

# cpp PRESET: builds and tests.
cpp() {
  local run=()
  # Sanitizers want the classic address space layout, which newer kernels randomise too much.
  if [[ $1 != release ]] && setarch "$(uname -m)" -R true 2>/dev/null; then run=(setarch "$(uname -m)" -R); fi
  cmake --preset "$1" -DPython_EXECUTABLE="$VENV/bin/python" >"build/$1.log" || { cat "build/$1.log"; return 1; }
  cmake --build --preset "$1" -j "$JOBS"
  export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
  export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
  export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
  if [[ -f proxy/tests/tsan.supp ]]; then TSAN_OPTIONS+=:suppressions=$ROOT/proxy/tests/tsan.supp; fi
  if [[ -f proxy/tests/lsan.supp ]]; then export LSAN_OPTIONS=suppressions=$ROOT/proxy/tests/lsan.supp; fi
  "${run[@]}" ctest --preset "$1" --no-tests=error -j "$JOBS"
}

# Kernels for other GPUs than the build's: they compile.
other_gpus() {
  cmake --preset release -DPython_EXECUTABLE="$VENV/bin/python" >build/release.log || { cat build/release.log; return 1; }
  grep -q 'building for CUDA' build/release.log || skip "no nvcc"
  cmake --build --preset release -j "$JOBS" --target pplx_cuda_other_gpus
}

# Every parser of bytes from the network: its corpus, then FUZZ_SECONDS each of new inputs.
FUZZ_SECONDS=${FUZZ_SECONDS:-12}
fuzz() {
  command -v clang++ >/dev/null || skip "clang is not installed"
  local classic=()
  if setarch "$(uname -m)" -R true 2>/dev/null; then classic=(setarch "$(uname -m)" -R); fi
  export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
  cmake --preset fuzz >build/fuzz.log 2>&1 || { cat build/fuzz.log; return 1; }
  cmake --build --preset fuzz -j "$JOBS"
  local target name
  for target in build/fuzz/tests/fuzz/fuzz_*; do
    [[ -f $target && -x $target ]] || continue
    name=${target##*/fuzz_}
    mkdir -p "build/fuzz/corpus/$name" "build/fuzz/crashes"
    printf '%s\0' "$name"
  done | "${classic[@]}" xargs -0 -P "$JOBS" -I NAME sh -c \
    'build/fuzz/tests/fuzz/fuzz_NAME -max_total_time='"$FUZZ_SECONDS"' -timeout=25 -max_len=1024 -verbosity=0 \
       -print_final_stats=1 -artifact_prefix=build/fuzz/crashes/NAME- build/fuzz/corpus/NAME tests/fuzz/corpus/NAME \
       >build/fuzz/NAME.log 2>&1 || {
         tail -n 60 build/fuzz/NAME.log
         for found in build/fuzz/crashes/NAME-*; do echo "$found:"; base64 "$found"; done
         grep -E -m 5 "ERROR|what\(\)|SUMMARY|does not hold" build/fuzz/NAME.log
         echo "fuzz_NAME: FAILED"
         exit 255
       }
     echo "fuzz_NAME: $(grep -o "number_of_executed_units.*" build/fuzz/NAME.log)"'
}

# The exchange's real code on virtual time: seeds of the day for SIM_SECONDS, some that stay the same, each run twice,
# a rank's death at every step of a program, and bugs that must be caught.
SIM_SECONDS=${SIM_SECONDS:-20}
sim() {
  local folder=build/release/tests/sim day
  [[ $(uname -s) == Linux ]] || skip "it replaces parts of glibc"
  cmake --preset release -DPython_EXECUTABLE="$VENV/bin/python" >build/release.log || { cat build/release.log; return 1; }
  cmake --build --preset release -j "$JOBS" --target pplx_sim pplx_sim_mutants
  day=$(date -u +%Y%m%d)
  say "the day's seeds begin at ${day}0000"
  "$folder/pplx_sim" --seed "${day}0000" --seeds 10000 --seconds "$SIM_SECONDS" --jobs "$JOBS"
  "$folder/pplx_sim" --seed 1 --seeds 30 --twice --jobs "$JOBS"
  "$folder/pplx_sim" --seed 1 --ranks 3 --exchanges 4 --faults kill,freeze,nic --every-step --jobs "$JOBS"
  "$VENV/bin/python" tests/sim/mutants.py run "$folder/pplx_sim_mutants"
}

model() {
  command -v spin >/dev/null || skip "spin is not installed"
  "$VENV/bin/python" tests/model/run.py --jobs "$JOBS"
}

# Fabric "verbs" against the kernel's RDMA stack, in emulated guests.
soft_roce() {
  [[ $(uname -m) == x86_64 ]] || skip "its guests are x86_64, this machine is $(uname -m)"
  # In a subshell: where the packages cannot be installed the stage is skipped, and says why.
  (install_apt soft-roce) >build/soft-roce.log 2>&1 || skip "$(tail -n 1 build/soft-roce.log)"
  python3 tests/soft_roce/guest.py --check 2>build/soft-roce.log || skip "$(tail -n 1 build/soft-roce.log)"
  cmake --preset release -DPython_EXECUTABLE="$VENV/bin/python" >build/release.log || { cat build/release.log; return 1; }
  cmake --build --preset release -j "$JOBS" --target pplx_proxy_tests pplx_rank_tests
  tests/soft_roce/run.sh build/release
}

run_pytest() { "$VENV/bin/python" -m pytest --durations=15 "$@"; }

# Another Python, a regular (not editable) install, run from outside of the source tree.
newest_python() {
  local candidate found=''
  "$VENV/bin/python" -c "import sys; sys.exit(sys.version_info[:2] >= (${NEWEST/./, }))" ||
    skip "$("$VENV/bin/python" -V) is what the main run used"
  for candidate in "python$NEWEST" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$NEWEST".*/bin/python"$NEWEST"; do
    if "$candidate" -c 'import ensurepip, venv, sysconfig, os, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' 2>/dev/null; then
      found=$candidate
      break
    fi
  done
  [[ -n $found ]] || skip "no python$NEWEST (with venv and headers) on this machine"
  make_venv "$NEWEST_VENV" "$found"
  activate "$NEWEST_VENV"
  once "$NEWEST_VENV/.requirements-test" "$(requirements_key test)" install_requirements "$NEWEST_VENV" test
  # shellcheck disable=SC2046
  once "$NEWEST_VENV/.package" "$(extension_key) $(digest $(modules))" \
    "$NEWEST_VENV/bin/python" -m pip install -qq --no-build-isolation --no-deps --force-reinstall . \
    -C "build.tool-args=-j$JOBS"
  "$NEWEST_VENV/bin/python" -c 'import sys, jax, flax, numpy
print(f"Python {sys.version.split()[0]}, jax {jax.__version__}, flax {flax.__version__}, numpy {numpy.__version__}")'
  mkdir -p build/newest
  cd build/newest
  "$NEWEST_VENV/bin/python" -m pytest -c "$ROOT/pyproject.toml" --rootdir "$ROOT" -p no:cacheprovider -m smoke "$ROOT/tests"
}

# A wheel as others would install it: for many Linux distributions, without libraries of ours in it, into an
# environment that has no compiler, run from outside of the source tree.
wheel() {
  local out=$ROOT/build/wheel bare=$ROOT/build/wheel/venv key raw repaired
  mkdir -p "$out"
  # shellcheck disable=SC2046
  key="$(extension_key) $(digest $(modules) README.md)"
  once "$out/.built" "$key" build_wheel "$out"
  raw=$(echo "$out"/raw/*.whl)
  repaired=$(echo "$out"/repaired/*.whl)
  auditwheel show "$repaired"
  "$VENV/bin/python" scripts/wheel_check.py "$raw" "$repaired"
  make_venv "$bare" "$PYTHON"
  once "$bare/.installed" "$key" install_wheel "$bare" "$repaired"
  cd "$out"
  env -i PATH="$bare/bin" HOME="$out" "$bare/bin/python" -I "$ROOT/scripts/wheel_smoke.py"
  env -i PATH="$bare/bin" HOME="$out" "$bare/bin/pplx-jax" doctor --json >doctor.json
}

build_wheel() { # FOLDER
  rm -rf "$1/raw" "$1/repaired"
  # The options of the editable install, so that the objects that it left are used.
  "$VENV/bin/python" -m pip wheel -q --no-build-isolation --no-deps -w "$1/raw" . -C cmake.define.PPLX_WERROR=ON \
    -C "build.tool-args=-j$JOBS"
  auditwheel repair -w "$1/repaired" "$1"/raw/*.whl
}

install_wheel() { # VENV WHEEL
  # No compiler is in this PATH. The first line is for the requirements: pip leaves an equal version as it is.
  env PATH="$1/bin" "$1/bin/python" -m pip install -q --only-binary :all: "$2"
  env PATH="$1/bin" "$1/bin/python" -m pip install -q --no-deps --force-reinstall --no-index "$2"
}

benchmark() { # NAME
  local name=$1
  shift
  if [[ $name == *_gpu ]] && ! "$VENV/bin/python" -c 'import jax; jax.devices("gpu")' 2>/dev/null; then
    skip "JAX finds no GPU"
  fi
  "$VENV/bin/python" "benchmarks/$name.py" "$@"
}

# ---- commands ------------------------------------------------------------------------------------------

prepare() { # EXTRA APT-SECTION...
  trap finish EXIT
  trap 'exit 130' INT TERM
  stage setup setup "$@"
  ((status == 0)) || exit 1
  activate "$VENV"
  use_ccache
  mkdir -p build
}

case $COMMAND in
  setup)
    prepare dev build test
    ;;
  test)
    prepare dev build test
    stage ruff check_ruff
    stage mypy check_mypy
    stage clang-format check_clang_format
    stage ctest cpp release
    stage other-gpus other_gpus
    stage soft-roce soft_roce
    stage ctest-asan cpp asan
    stage ctest-tsan cpp tsan
    stage fuzz fuzz
    stage model model
    stage sim sim
    stage clang-tidy check_clang_tidy
    stage newest-python newest_python
    stage wheel wheel
    stage pytest run_pytest "$@"
    ;;
  lint)
    prepare dev build test
    stage ruff check_ruff
    stage mypy check_mypy
    stage clang-format check_clang_format
    stage clang-tidy check_clang_tidy
    ;;
  format)
    prepare dev build test
    ruff check --fix --exit-zero .
    ruff format .
    ours | xargs clang-format -i
    ;;
  demo)
    prepare demo build
    stage demo "$VENV/bin/python" -m pplx_jax demo "$@"
    ;;
  bench)
    prepare dev build test
    for script in engine exchange_cpu exchange_gpu; do
      stage "$script" benchmark "$script" "$@"
    done
    ;;
  *)
    die "usage: scripts/dev.sh {setup|test|lint|format|demo|bench}; see make help"
    ;;
esac
