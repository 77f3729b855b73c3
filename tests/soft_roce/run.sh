#!/usr/bin/env bash
# Fabric verbs against the kernel's own RDMA stack (Soft-RoCE), in guests. Status 77: guests cannot run here.
#   run.sh BUILD_FOLDER
set -euo pipefail
build=$(realpath "$1")
cd "$(dirname "$0")"
guest=(python3 guest.py)
"${guest[@]}" --check
echo '--- one guest: the conformance tests, and engines and MoE steps of 3 ranks over verbs and tcp'
"${guest[@]}" --timeout 280 "$PWD/conformance.sh" "$build"
echo '--- two guests that lose 1 % of their packets: engines and MoE steps of 4 ranks over verbs and tcp'
"${guest[@]}" --guests 2 --cpus 1 --memory 1536 --loss 1 --timeout 150 "$PWD/ranks.sh" "$build" 2 2
