#!/usr/bin/env bash
# In one guest: what every fabric must do, over verbs; then ranks in processes of their own, over verbs and tcp.
#   conformance.sh BUILD_FOLDER
set -uo pipefail
tests=$1/proxy/tests/pplx_proxy_tests
failed=0

# Everything once; sprayed and with tiny queues what depends on either.
few='CloseEndsWhatIsUnderWay|WritesOfEverySizeAndOffset|CountsEveryImmediateOnce|BytesAreThereWhenTheImmediateIs|MoreThanThereAreBuffers'
mapfile -t names < <("$tests" --gtest_list_tests | awk '/^[^ ]/ {suite = $1} /^ / {print suite $1}')
wanted=() alone=()
for name in "${names[@]}"; do
  case $name in
    */ProcessTest.*/verbs) alone+=("$name") ;;
    */verbs | VerbsTest.* | VerbsFabricTest.* | VerbsMemlock.* | VerbsSuspended.*) wanted+=("$name") ;;
    */verbs_*) if [[ $name =~ \.($few)/ ]]; then wanted+=("$name"); fi ;;
  esac
done
((${#wanted[@]} >= 30 && ${#alone[@]} >= 2)) || { echo "the tests of verbs are missing"; exit 1; }
"$tests" --gtest_brief=1 --gtest_filter="$(IFS=:; echo "${wanted[*]}")" || failed=1
# Forks of a process that has loaded libibverbs cannot use it.
for name in "${alone[@]}"; do
  "$tests" --gtest_brief=1 --gtest_filter="$name" || failed=1
done
"$(dirname "$0")/ranks.sh" "$1" 3 || failed=1
exit $failed
