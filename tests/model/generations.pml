/* A group fails or closes while its writes are under way, and the same processes make the next one: what is late must
 * not reach it. Docs: P10 of docs/protocol.md, "Connect and close".
 *
 * Rank 0 receives, the others send one message (bytes, then its immediate) and one notice (its immediate alone, for
 * which no key is checked) in each of two generations. Generation 1 may end at any time on any rank.
 */
#ifndef RANKS
#define RANKS 2
#endif

/* Seeded bugs:
 *   BUG_FREED_WHILE_REGISTERED  memory is given back before its registration ends
 *   BUG_LANDING_NOT_AWAITED     ending a registration does not wait for bytes that are landing
 *   BUG_KEY_REUSED              generation 2's registration has the key and address of generation 1's
 *   BUG_NO_NONCE                an immediate does not say which generation it is of
 *   BUG_SEND_BUFFER_FREED       the sender gives its send buffer back before its endpoints are closed
 */
#define FREE 9            /* whoever has the memory now is not of this group */
#define IDLE 0
#define FLYING 1
#define LANDING 2
#define LANDED 3
#define ARRIVED 4
#define GONE 5

byte owner;               /* of rank 0's regions: the generation */
bool registered[3];       /* by generation */
byte content[RANKS];      /* by source: the generation whose bytes are in its region */
byte landing[3];          /* messages that are landing just now, by generation */
bool held[3 * RANKS];     /* the network has the bytes: the sender's buffer is not read any more */
byte send_buffer[RANKS];  /* owner, by rank */
byte message[3 * RANKS], notice[3 * RANKS];   /* by generation and source */
byte count[3 * RANKS], noticed[3 * RANKS];    /* at rank 0 */
byte current;             /* the generation whose counters are open */
byte published;           /* endpoints of generation 2 in the key-value store */

#define AT(g, s) ((g) * RANKS + (s))
#ifdef BUG_KEY_REUSED
#define KEY_HOLDS(g) (registered[1] || registered[2])
#else
#define KEY_HOLDS(g) registered[g]
#endif
#ifdef BUG_NO_NONCE
#define COUNT(counter, g, s) counter[AT(current, s)]++; assert(current != 2 || counter[AT(2, s)] <= 1)
#else
#define COUNT(counter, g, s) if :: (g) == current -> counter[AT(g, s)]++; assert(counter[AT(g, s)] <= 1) :: else fi
#endif

proctype Nic(byte g; byte s) {
end:
  do
  :: d_step { message[AT(g, s)] == FLYING && KEY_HOLDS(g) ->
       assert(send_buffer[s] == g || held[AT(g, s)]);
       message[AT(g, s)] = LANDING;
       landing[g]++ }
  :: d_step { message[AT(g, s)] == FLYING && !KEY_HOLDS(g) -> message[AT(g, s)] = GONE }   /* refused */
  :: d_step { message[AT(g, s)] == LANDING ->
       landing[g]--;
       assert(owner == g);                  /* no late write */
       assert(send_buffer[s] == g || held[AT(g, s)]);
       content[s] = g;
       message[AT(g, s)] = LANDED }
  :: d_step { message[AT(g, s)] == LANDED -> message[AT(g, s)] = ARRIVED; COUNT(count, g, s) }
  :: d_step { notice[AT(g, s)] == FLYING -> notice[AT(g, s)] = ARRIVED; COUNT(noticed, g, s) }
  od
}

#if RANKS == 2
#define HERE(g) (count[AT(g, 1)] >= 1)
#define READABLE(g) (content[1] == g)
#else
#define HERE(g) (count[AT(g, 1)] >= 1 && count[AT(g, 2)] >= 1)
#define READABLE(g) (content[1] == g && content[2] == g)
#endif

proctype Receiver() {
  if
  :: HERE(1) -> assert(READABLE(1))
  :: true                                   /* a failure, or a close */
  fi;
  current = 0;                              /* nobody watches generation 1's immediates any more */
#ifdef BUG_FREED_WHILE_REGISTERED
  owner = FREE;
  registered[1] = false;
#else
#ifdef BUG_LANDING_NOT_AWAITED
  registered[1] = false;
#else
  /* The endpoints are closed: what is landing is over, and nothing lands after. */
  d_step { landing[1] == 0 -> registered[1] = false };
#endif
  owner = FREE;
#endif
  d_step { owner = 2; registered[2] = true; current = 2 };
  published++;
  HERE(2);
  assert(READABLE(2))
}

proctype Sender(byte s) {
  if
  :: d_step { message[AT(1, s)] = FLYING; notice[AT(1, s)] = FLYING }
  :: d_step { message[AT(1, s)] = FLYING }
  :: true
  fi;
#ifdef BUG_SEND_BUFFER_FREED
  send_buffer[s] = FREE;
#else
  /* Its endpoints are closed, and nothing reads the buffer after: what has not left is gone, what has left may still
     arrive. */
  if
  :: d_step { message[AT(1, s)] == FLYING -> message[AT(1, s)] = GONE }
  :: held[AT(1, s)] = true
  fi;
  send_buffer[s] = FREE;
#endif
  send_buffer[s] = 2;
  published++;
  (published == RANKS);                     /* all endpoints are there: connected */
  d_step { message[AT(2, s)] = FLYING; notice[AT(2, s)] = FLYING }
}

init {
  atomic {
    owner = 1;
    registered[1] = true;
    current = 1;
    send_buffer[1] = 1;
    run Nic(1, 1);
    run Nic(2, 1);
    run Sender(1);
#if RANKS == 3
    send_buffer[2] = 1;
    run Nic(1, 2);
    run Nic(2, 2);
    run Sender(2);
#endif
    run Receiver()
  }
}
