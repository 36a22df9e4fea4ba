/* What _accounts.c shows of prices, loads and charges. */

#ifndef DISAGG_ROUTING_ACCOUNTS_H
#define DISAGG_ROUTING_ACCOUNTS_H

#include "_fits.h"

#define NUM_TURNS 11
#define NOWHERE -1

/* See CostFields in fields.py. */
typedef struct {
    PyObject_HEAD
    double prefill[3], decode[3], pull[3];
    char fitted, prefill_fitted, decode_fitted;
    long long budget, beside_streams, max_seqs, chunk, links;
    double begin_s, chunk_s, token_s, attended_s, idle_chunk_s, step_s, bare_step_s, aside, idle_step_s;
    double joined_s;
    double sequence_s, place_s, queued, sequences;
} Costs;

/* See AccountFields in fields.py. */
typedef struct {
    PyObject_HEAD
    PyObject *requests, *objectives, *costs;
    long long shorter[NUM_TURNS];
    long long absorbed, fresh, foreign_tokens, absorbed_upto, coming, seqs, present, foreign_seqs;
    long long blocks, blocks_here, foreign_blocks, max_seqs, block_size, kv_total;
    double progress, coming_s, aside_s, aside_at;
} Account;

/* See Charge in fields.py. Refers to nothing that could refer back to it. */
typedef struct {
    PyObject_HEAD
    PyObject *request_id, *frontend_id, *hashes, *prediction, *tpot_s;
    long long number, prefill_slot, decode_slot, tokens, prefill_blocks, decode_blocks, turn;
    double placed_at, prefill_s;
    char prefilled;
} Charge;

extern PyTypeObject CostsType, AccountType, ChargeType;

#define ASIDE_S 5.0

/* Return the Costs of an account; NULL with an exception set. */
Costs *costs_of(const Account *account);

/* Return the account in a slot; NULL with an exception set. */
Account *account_in(PyObject *accounts, long long slot);

/* Account.batch_to_come */
void batch_to_come(const Account *account, double life_s, double *sequences, double *blocks);

/* Account.aside_share */
double aside_share(const Account *account, double now);

/* turn_of in costs.py */
int turn_of(long long tokens, long long urgency);

/* Functions for Python, see charges.py. */
PyObject *open_charge(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *move_charge(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *close_charge(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *observe(PyObject *module, PyObject *const *args, Py_ssize_t count);

#endif
