// Which cache rows are of use to a run of query tokens.
#pragma once

#include "params.h"
#include "simt.h"

namespace mla_pass::cuda {

struct Rows {
  int first, end;
};

// Rows that some query of the run sees, hidden ones in their midst aside; see Attend for `behind`.
MLA_DEVICE Rows seen_rows(const Span& span, int tokens, int behind, int window, int causal) {
  const int first_query = span.total - behind - tokens;
  return {window > 0 ? max(span.first, first_query - window + 1) : span.first,
          causal ? min(span.end, span.total - behind) : span.end};
}

}  // namespace mla_pass::cuda
