/* A group fails or closes while its writes are under way, and the same processes make the next one: what is late must
 * not reach it. Docs: P10 of docs/protocol.md, "Connect and close".
 *
 * In each of two generations every rank runs a program of exchanges: it sends to all (bytes, then their immediate), then
 * receives from all. The first generation may end on any rank at any point of it, for any reason, which the rank tells
 * the others by a notice (an immediate alone, for which no key is checked) or fails to tell. One rank may die there; the
 * others make the second generation without it. The second must run to its end, though what is left of the first lands,
 * is counted, is refused or is lost at any time.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef EXCHANGES /* of a generation; each on a lane of its own, whose use again is exchange.pml's matter */
#define EXCHANGES 1
#endif
#ifndef DEATHS    /* ranks that may die, 0 or 1 */
#define DEATHS 0
#endif

/* Seeded bugs:
 *   BUG_FREED_WHILE_REGISTERED  memory is given back before its registration ends
 *   BUG_LANDING_NOT_AWAITED     ending a registration does not wait for bytes that are landing
 *   BUG_KEY_REUSED              generation 2's registration has the key and address of generation 1's
 *   BUG_NO_NONCE                an immediate does not say which generation it is of
 *   BUG_SEND_BUFFER_FREED       the sender gives its send buffer back before its endpoints are closed
 *   BUG_THE_DEAD_AWAITED        generation 2 waits for a rank that has died
 */
#define FREE 9            /* whoever has the memory now is not of this group */
#define IDLE 0            /* not sent, or over */
#define FLYING 1          /* read from the sender's buffer on its way */
#define HELD 2            /* flying, all bytes with the network: the sender's buffer is not read any more */
#define LANDING 3
#define HELD_LANDING 4
#define LANDED 5

typedef Rank_ {
  byte owner;                      /* of its regions: the generation */
  byte sends;                      /* owner of its send buffers */
  byte current;                    /* the generation whose immediates are watched */
  bool registered[3];              /* by generation */
  byte landing[3];                 /* messages that are landing just now, by generation */
  byte content[RANKS * EXCHANGES]; /* by source and lane: the generation whose bytes are in the region */
  byte counted[RANKS];             /* by source: bits of the lanes whose immediate was counted */
  bool dead
}
Rank_ rank[RANKS];
byte message[3 * RANKS * RANKS * EXCHANGES];
bool notice[RANKS * RANKS];        /* of generation 1, under way */
byte published;                    /* endpoints of generation 2 in the key-value store */
byte deaths;

#define MESSAGE(g, s, d, k) message[(((g) * RANKS + (s)) * RANKS + (d)) * EXCHANGES + (k)]
#define NOTICE(s, d) notice[(s) * RANKS + (d)]
#ifdef BUG_KEY_REUSED
#define KEY_HOLDS(d, g) (rank[d].registered[1] || rank[d].registered[2])
#else
#define KEY_HOLDS(d, g) rank[d].registered[g]
#endif
#ifdef BUG_NO_NONCE
#define WATCHED(d, g) (rank[d].current != 0)
#else
#define WATCHED(d, g) (rank[d].current == (g))
#endif
#define READ_FROM_BUFFER(g, k) \
  assert(MESSAGE(g, s, d, k) == HELD || MESSAGE(g, s, d, k) == HELD_LANDING || rank[s].sends == g)

/* Everything that may happen to one message. Generation 2 has no notice: one that is counted in it would fail it. */
#define EVENTS(k) \
  :: d_step { (MESSAGE(g, s, d, k) == FLYING || MESSAGE(g, s, d, k) == HELD) && KEY_HOLDS(d, g) -> \
       READ_FROM_BUFFER(g, k); \
       MESSAGE(g, s, d, k) = MESSAGE(g, s, d, k) + 2; \
       rank[d].landing[g]++ } \
  :: d_step { (MESSAGE(g, s, d, k) == FLYING || MESSAGE(g, s, d, k) == HELD) && !KEY_HOLDS(d, g) -> \
       MESSAGE(g, s, d, k) = IDLE }                  /* refused */ \
  :: d_step { (MESSAGE(g, s, d, k) == LANDING || MESSAGE(g, s, d, k) == HELD_LANDING) -> \
       rank[d].landing[g]--; \
       assert(rank[d].owner == g);                   /* no late write */ \
       READ_FROM_BUFFER(g, k); \
       rank[d].content[(s) * EXCHANGES + k] = g; \
       MESSAGE(g, s, d, k) = LANDED } \
  :: d_step { MESSAGE(g, s, d, k) == LANDED -> \
       MESSAGE(g, s, d, k) = IDLE; \
       if \
       :: WATCHED(d, g) -> \
            assert(!(rank[d].counted[s] & (1 << k)) && g == rank[d].current); \
            rank[d].counted[s] = rank[d].counted[s] | (1 << k) \
       :: else \
       fi }

proctype Nic(byte g; byte s; byte d) {
end:
  do
  EVENTS(0)
#if EXCHANGES > 1
  EVENTS(1)
#endif
  :: d_step { g == 1 && NOTICE(s, d) -> NOTICE(s, d) = false; assert(!WATCHED(d, g) || rank[d].current == 1) }
  od
}

#define HAS(r, s, g, k) ((s) == r || (g == 2 && rank[s].dead) || (rank[r].counted[s] & (1 << k)))
#define HOLDS(r, s, g, k) ((s) == r || (g == 2 && rank[s].dead) || rank[r].content[(s) * EXCHANGES + k] == g)
#if RANKS == 2
#define HERE(r, g, k) (HAS(r, 0, g, k) && HAS(r, 1, g, k))
#define READABLE(r, g, k) (HOLDS(r, 0, g, k) && HOLDS(r, 1, g, k))
#else
#define HERE(r, g, k) (HAS(r, 0, g, k) && HAS(r, 1, g, k) && HAS(r, 2, g, k))
#define READABLE(r, g, k) (HOLDS(r, 0, g, k) && HOLDS(r, 1, g, k) && HOLDS(r, 2, g, k))
#endif
#ifdef BUG_THE_DEAD_AWAITED
#define CONNECTED (published == RANKS)
#else
#define CONNECTED (published == RANKS - deaths)
#endif

inline send(g, k) {
  d_step {
    to = 0;
    do
    :: to < RANKS ->
         if
         :: to != r && !(g == 2 && rank[to].dead) -> MESSAGE(g, r, to, k) = FLYING
         :: else
         fi;
         to++
    :: else -> break
    od;
    to = 0
  }
}

proctype Rank(byte r) {
  byte k, to, lane;
  do
  :: k < EXCHANGES ->
       send(1, k);
       if
       :: HERE(r, 1, k) -> assert(READABLE(r, 1, k)); k++
       :: true -> break                    /* a failure */
       fi
  :: true -> break                         /* a failure, or a close */
  od;
  atomic {
    k = 0;
    rank[r].current = 0                    /* nobody watches generation 1's immediates any more */
  };
  if
  :: d_step {
       to = 0;
       do
       :: to < RANKS -> NOTICE(r, to) = (to != r); to++
       :: else -> break
       od;
       to = 0 }
  :: true                                  /* it has been told, or cannot tell */
#if DEATHS
  :: d_step { deaths == 0 -> deaths++; rank[r].dead = true }
#endif
  fi;
#ifdef BUG_SEND_BUFFER_FREED
  rank[r].sends = FREE;
#endif
  /* Its endpoints are closed, and nothing reads the buffers after: what has not left is gone, what has left may still
     arrive. */
  atomic {
    do
    :: to < RANKS ->
         lane = 0;
         do
         :: lane < EXCHANGES ->
              if
              :: MESSAGE(1, r, to, lane) == FLYING -> MESSAGE(1, r, to, lane) = IDLE
              :: MESSAGE(1, r, to, lane) == FLYING -> MESSAGE(1, r, to, lane) = HELD
              :: MESSAGE(1, r, to, lane) == LANDING -> MESSAGE(1, r, to, lane) = HELD_LANDING
              :: else
              fi;
              lane++
         :: else -> break
         od;
         to++
    :: else -> break
    od;
    to = 0;
    lane = 0;
#ifdef BUG_FREED_WHILE_REGISTERED
    rank[r].owner = FREE;
#endif
    rank[r].sends = FREE
  }
#ifdef BUG_LANDING_NOT_AWAITED
  rank[r].registered[1] = false;
#else
  /* What is landing is over, and nothing lands after. */
  d_step { rank[r].landing[1] == 0 -> rank[r].registered[1] = false };
#endif
  rank[r].owner = FREE;
  if
  :: rank[r].dead -> goto out
  :: else
  fi;
  d_step {
    to = 0;
    do
    :: to < RANKS -> rank[r].counted[to] = 0; to++
    :: else -> break
    od;
    to = 0;
    rank[r].owner = 2;
    rank[r].sends = 2;
    rank[r].registered[2] = true;
    rank[r].current = 2;
    published++
  };
  CONNECTED;                               /* all endpoints are there */
  do
  :: k < EXCHANGES ->
       send(2, k);
       HERE(r, 2, k);
       assert(READABLE(r, 2, k));
       k++
  :: else -> break
  od;
out:
  skip
}

init {
  byte a, b;
  atomic {
    do
    :: a < RANKS ->
         rank[a].owner = 1;
         rank[a].sends = 1;
         rank[a].current = 1;
         rank[a].registered[1] = true;
         b = 0;
         do
         :: b < RANKS ->
              if
              :: a != b -> run Nic(1, a, b); run Nic(2, a, b)
              :: else
              fi;
              b++
         :: else -> break
         od;
         run Rank(a);
         a++
    :: else -> break
    od
  }
}
