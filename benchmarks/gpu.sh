#!/usr/bin/env bash
# Builds, checks and measures on a machine with an NVIDIA GPU; installs nothing, needs no network.
# Python needs torch >= 2.11 with triton, numpy, pytest, setuptools and ninja. See docs/gpu.md.
#
#   benchmarks/gpu.sh [--stand-in] [first] [test] [models] [STAGE ...]    first if nothing is named
#
# first is env build checks kernels counters steps profile choices, test is env build tests sanitizer
# training, models is env build memory graph blocks compiled stages12. Each of these stages runs for itself under
# its own time limit, and none stops another. All results are in $OUT (runs/gpu if not set), at most 10
# files, as soon as they exist; a digest of them is printed last. --stand-in rehearses without a GPU.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
call_seconds=${CALL_SECONDS:-570}
export PYTHONUNBUFFERED=1

stand_in=
stages=()
[ "${1:-}" = --stand-in ] && stand_in=--stand-in && shift
for word in "${@:-first}"; do
  case $word in
    first) stages+=(env build checks kernels counters steps profile choices) ;;
    test) stages+=(env build tests sanitizer training) ;;
    models) stages+=(env build memory graph blocks compiled stages12) ;;
    env | build | checks | kernels | counters | steps | profile | choices | tests | sanitizer | training | \
      memory | graph | blocks | compiled | stages12) stages+=("$word") ;;
    *)
      echo "gpu.sh: there is no call or stage '$word'; there are first, test and models" >&2
      exit 2
      ;;
  esac
done
[ "${stages[0]}" = env ] || stages=(env "${stages[@]}")

# A rehearsal may take place on a busy machine.
[ -n "$stand_in" ] && slower=5 || slower=1
deadline=$((SECONDS + call_seconds * slower))

mkdir -p "$out" || exit 1
log=$out/log.txt
echo "#### ${stand_in:+STAND-IN, a rehearsal on a CPU: }${stages[*]}" >>"$log"

# Runs a command as a stage: run NAME SECONDS COMMAND...
failures=0
run() {
  local name=$1 limit=$(($2 * slower)) begin=$SECONDS left=$((deadline - SECONDS)) outcome note code
  shift 2
  ((limit < left)) || limit=$left
  if ((limit < 3)); then
    failures=$((failures + 1))
    echo "$name: not run, no time was left"
    "$python" -m benchmarks.gpu.store "$out/run.json" "$name" "not run" 0 0 "no time was left"
    return 1
  fi
  if [ -n "$stand_in" ]; then # what goes wrong in a rehearsal
    case " ${CONVMAE_REHEARSAL_FAULTS:-} " in
      *" $name=hang "*) limit=3 && set -- sleep 1000 ;;
      *" $name=fail "*) set -- sh -c 'echo failed on purpose; exit 3' ;;
    esac
  fi
  echo "== $name, at most $limit s: $*" >>"$log"
  timeout --signal="${signal:-TERM}" --kill-after=8 "$limit" "$@" >>"$log" 2>&1 </dev/null
  code=$?
  note=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-300)
  case $code in
    0) outcome=ok ;;
    124 | 137) outcome=hung note="stopped after its $limit s; the last line of its log: $note" ;;
    *) outcome=failed ;;
  esac
  ((code == 0)) || failures=$((failures + 1))
  echo "$name: $outcome after $((SECONDS - begin)) s: $note"
  "$python" -m benchmarks.gpu.store "$out/run.json" "$name" "$outcome" $((SECONDS - begin)) "$limit" "$note"
  "$python" -m benchmarks.gpu.digest "$out" --quiet
  return $code
}

# Runs cases of the benchmark as a stage: measure NAME SECONDS ARGUMENTS...
measure() {
  local name=$1 limit=$2 sizes
  shift 2
  sizes=(--device cuda --batch_size 128 --dtype bfloat16)
  [ -n "$stand_in" ] && sizes=(--device cpu --model convmae_tiny --img_size 64 --batch_size 2
    --dtype float32 --repeats 1 --stand-in)
  run "$name" "$limit" "$python" -m benchmarks "${sizes[@]}" --no-compile --keep \
    --json "$out/$device-steps.json" "$@"
}

# One contender of the training step against the dense one; a rehearsal compiles and captures nothing.
# contender NAME SECONDS PATTERN [FLAG]
contender() {
  local pattern=$3 flag=${4:-}
  [ -n "$stand_in" ] && pattern=packed flag=
  measure "$1" "$2" --case step $flag --budget 10 --contender "$pattern"
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

device= built=
for stage in "${stages[@]}"; do
  case $stage in
    env)
      [ -n "$device" ] && continue
      if ! run env 30 "$python" -m benchmarks.gpu.environment "$out/run.json" $stand_in; then
        "$python" -m benchmarks.gpu.digest "$out"
        exit 1
      fi
      device=$(sed -n 's/^device=//p' "$log" | tail -n 1)
      capability=$(sed -n 's/^capability=//p' "$log" | tail -n 1)
      ;;
    build)
      [ -n "$built" ] && continue
      built=yes
      run build 100 "$python" -m benchmarks.gpu.build "${capability:-unknown}" $stand_in
      ;;
    checks)
      rm -f "$out/$device-kernels.json"
      run checks 90 "$python" -m benchmarks.gpu.items checks "$out/$device-kernels.json" 85 $stand_in
      ;;
    kernels)
      run kernels 180 "$python" -m benchmarks.gpu.items kernels "$out/$device-kernels.json" 175 $stand_in
      ;;
    counters)
      rm -f "$out/$device-counters.csv"
      run counters 80 "$python" -m benchmarks.gpu.counters "$out/$device-counters.csv" 75 $stand_in
      ;;
    steps)
      [ -n "$stand_in" ] && other=mask || other=mae # which is large
      measure steps 60 --case step "$other" --budget 4
      ;;
    profile)
      rm -f "$out/$device-profile.json"
      run profile 40 "$python" -m benchmarks.gpu.profile "$out/$device-profile.json" $stand_in
      ;;
    choices)
      rm -f "$out/$device-choices.json"
      run choices 100 "$python" -m benchmarks.gpu.choices "$out/$device-choices.json" 80 $stand_in
      ;;
    tests)
      report=$out/${stand_in:+stand-in-}tests.xml
      rm -f "$report"
      options=(-v -m gpu tests/gpu/test_gpu.py --junitxml "$report")
      [ -z "$stand_in" ] && has xdist && options+=(-n $((($(nproc) * 3 + 3) / 4)))
      has pytest_timeout && options+=(--timeout 120)
      [ -n "$stand_in" ] && options+=(-k dilations) # a few, which are skipped
      signal=INT run tests 420 "$python" -m pytest "${options[@]}"
      ;;
    training) # the command line, runs and their resumption, on the GPU
      report=$out/${stand_in:+stand-in-}training.xml
      rm -f "$report"
      if ! has tyro || ! has torchvision || ! has webdataset; then
        run training 5 echo "left out: tyro, torchvision or webdataset is not installed"
        continue
      fi
      files=(tests/convmae/test_cli.py tests/convmae/{tasks,training,commands})
      options=(-v --junitxml "$report")
      [ -z "$stand_in" ] && has xdist && options+=(-n $((($(nproc) * 3 + 3) / 4)))
      [ -n "$stand_in" ] && options+=(-k test_info) where=cpu || where=cuda
      # A rehearsal runs one test of the first file, if the others are there.
      [ -n "$stand_in" ] && ls -d "${files[@]}" >/dev/null && files=("${files[0]}")
      CONVMAE_TEST_DEVICE=$where signal=INT run training 450 "$python" -m pytest "${options[@]}" "${files[@]}"
      ;;
    sanitizer) run sanitizer 110 "$python" -m pytest -v -rs -m gpu tests/gpu/test_gpu_sanitizer.py ;;
    memory) measure memory 150 --case memory ;;
    graph) contender graph 60 '*graph*' ;;
    blocks) contender blocks 120 '*blocks*' --compile-blocks ;;
    compiled) contender compiled 300 '* compiled' --compile-models ;;
    stages12) measure stages12 200 --case stages12 joined ;;
  esac
done
echo
"$python" -m benchmarks.gpu.digest "$out"
((failures == 0))
