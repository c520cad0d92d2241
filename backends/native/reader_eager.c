#include "reader_eager.h"

void eager_answered(struct eager *e, uint64_t now_ns)
{
    e->until_ns = 0;
    e->looks = 0;
    if (!e->credit && e->left_out) {
        e->left_out--;
        return;
    }
    e->until_ns = now_ns + EAGER_NS;
}

bool eager_looks(struct eager *e, uint64_t now_ns)
{
    if (!e->until_ns)
        return false;
    if (now_ns < e->until_ns) {
        e->looks++;
        return true;
    }
    e->until_ns = 0;
    e->credit = e->credit > EAGER_LOSS ? e->credit - EAGER_LOSS : 0;
    if (e->credit)
        return false;
    if (e->next_left_out < EAGER_LEFT_OUT)
        e->next_left_out = EAGER_LEFT_OUT;
    e->left_out = e->next_left_out;
    if (e->next_left_out < EAGER_LEFT_OUT_MOST)
        e->next_left_out *= 2;
    return false;
}

bool eager_found(struct eager *e)
{
    if (!e->until_ns)
        return false;
    e->until_ns = 0;
    if (e->looks > 1 && e->credit < EAGER_MOST && ++e->credit == EAGER_MOST)
        e->next_left_out = EAGER_LEFT_OUT;
    return true;
}
