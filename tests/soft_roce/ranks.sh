#!/usr/bin/env bash
# In each guest: so many ranks, one a process, of one group over all guests. What their engines do must bring its bytes
# over verbs and tcp, and steps over verbs must give the bytes that they give over tcp, and the oracle's.
#   ranks.sh BUILD_FOLDER RANKS_A_GUEST [GUESTS]
set -uo pipefail
here=$2 guests=${3:-1}
export RANKS=$((here * guests)) MEET=10.9.0.1:7001 ADDRESS=$GUEST_ADDRESS FABRICS='tcp verbs'
limit=$(awk "BEGIN {print 120 * ${PPLX_TEST_TIME_SCALE:-1}}")
ranks=() failed=0
for ((i = 0; i < here; ++i)); do
  RANK=$((GUEST * here + i)) timeout "$limit" "$1/xla_ffi/tests/pplx_rank_tests" --gtest_brief=1 &
  ranks+=($!)
done
for rank in "${ranks[@]}"; do wait "$rank" || failed=1; done
exit $failed
