// What a thread does between two polls that found nothing.
#pragma once

namespace pplx {

// `idle` counts the polls since the last event: spins, then yields the core, then sleeps.
void back_off(unsigned idle);

}  // namespace pplx
