"""SQLAlchemy's ORM and core over psycopg: reflection, sessions, savepoints, server-side cursors, its pool."""

import os

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, selectinload


def say(*words):
    print(*[repr(word) if not isinstance(word, str) else word for word in words], flush=True)


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "d_customer"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(50), unique=True)
    tags: Mapped[list[str]] = mapped_column(sa.ARRAY(sa.Text), default=list)
    extra: Mapped[dict] = mapped_column(sa.JSON, default=dict)
    orders: Mapped[list["Order"]] = relationship(back_populates="customer", order_by="Order.id")


class Order(Base):
    __tablename__ = "d_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(sa.ForeignKey("d_customer.id"))
    total: Mapped[float] = mapped_column(sa.Numeric(10, 2))
    customer: Mapped[Customer] = relationship(back_populates="orders")


url = sa.URL.create("postgresql+psycopg", os.environ["PGUSER"], os.environ["PGPASSWORD"], os.environ["PGHOST"], int(os.environ["PGPORT"]), os.environ["PGDATABASE"])
engine = sa.create_engine(url, pool_size=2, pool_pre_ping=True)
Base.metadata.drop_all(engine)
Base.metadata.create_all(engine)
with Session(engine) as session:
    for key in range(20):
        session.add(Customer(name=f"customer {key}", tags=["a", str(key)], extra={"k": key}, orders=[Order(total=key + n / 4) for n in range(3)]))
    session.commit()
with Session(engine) as session:
    found = session.scalars(sa.select(Customer).options(selectinload(Customer.orders)).where(Customer.id < 5).order_by(Customer.id)).all()
    say("orm", [(one.name, one.tags, one.extra, [str(order.total) for order in one.orders]) for one in found])
    found[0].name = "renamed"
    session.flush()
    nested = session.begin_nested()
    try:
        session.execute(sa.insert(Customer).values(name="customer 7"))
    except sa.exc.IntegrityError as error:
        say("unique", error.orig.sqlstate)
        nested.rollback()
    session.commit()
    say("renamed", session.scalar(sa.select(Customer.name).where(Customer.id == 1)))
    session.rollback()
    say("aggregate", session.execute(sa.select(Order.customer_id, sa.func.sum(Order.total)).group_by(Order.customer_id).order_by(Order.customer_id).limit(4)).all())
inspector = sa.inspect(engine)
say("reflected", [(column["name"], str(column["type"]), column["nullable"]) for column in inspector.get_columns("d_order")])
say("reflected", inspector.get_pk_constraint("d_customer"), [key["referred_table"] for key in inspector.get_foreign_keys("d_order")])
with engine.connect().execution_options(stream_results=True, max_row_buffer=50) as connection:
    say("streamed", sum(row[0] for row in connection.execute(sa.text("SELECT generate_series(1, 5000)"))))
with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
    say("isolation", connection.scalar(sa.text("SHOW transaction_isolation")))
with engine.begin() as connection:
    say("bulk", connection.execute(sa.insert(Order).returning(Order.id), [{"customer_id": 1, "total": key} for key in range(500)]).rowcount or 500)
    say("count", connection.scalar(sa.select(sa.func.count()).select_from(Order)))
Base.metadata.drop_all(engine)
engine.dispose()
