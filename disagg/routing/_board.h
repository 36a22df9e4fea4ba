/* What _board.c and _prices.c know of each other. */

#ifndef DISAGG_ROUTING_BOARD_H
#define DISAGG_ROUTING_BOARD_H

#include "_accounts.h"

#define DUE_PART (1.0 / 3.0)

/* The view's rows in their order; those of `shorter` follow. */
enum {
    QUEUED_TOKENS,
    SEQUENCES,
    EXCESS,
    KV_BLOCKS,
    BEGIN_S,
    TOKEN_S,
    ATTENDED_S,
    STEP_S,
    PLACE_S,
    TOKEN_PULL_S,
    BARE_STEP_S,
    ASIDE,
    TIGHTEST_S,
    NUM_COLUMNS
};
#define NUM_ROWS (NUM_COLUMNS + NUM_TURNS)

extern PyTypeObject BoardType;

/* Return the Costs of an account, worked out anew (ClusterView._priced); NULL with an exception set. */
Costs *priced(const Account *account, double expected_tokens, double now);

/* WorkerCosts.pull_s beside as many other pulls */
double pull_seconds(const Costs *costs, double num_tokens, double num_others);

#endif
